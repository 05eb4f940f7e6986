"""A small file that the user names beside the images: a configuration, labels, words."""

from pathlib import Path

from fsspec import AbstractFileSystem

from pipeline.addresses import behind_caches, scheme
from pipeline.storage import Options, filesystem, is_local
from schemas.redaction import one_line

MOST_BYTES = 64 * 1024 * 1024


class Unreadable(Exception):
    """Why such a file cannot be read, in words; whoever asked for it says which option named it, and what to do."""


def read_small(url: str, options: Options, *, most_bytes: int | None = MOST_BYTES) -> bytes:
    """What stands at `url`, local or on an object store. Raises Unreadable, also where it is more than `most_bytes`,
    and what `filesystem` raises."""
    fs, path = filesystem(url, options)
    try:
        # An open file of a web server that names no size gives less than it is asked for.
        data = bytes(fs.cat_file(path)) if scheme(behind_caches(url)) == "http" else _read(fs, path, most_bytes)
    except Exception as error:
        raise Unreadable(_why(error)) from error
    if most_bytes is not None and len(data) > most_bytes:
        raise Unreadable(f"more than {most_bytes >> 20} MiB")
    return data


def _read(fs: AbstractFileSystem, path: str, most_bytes: int | None) -> bytes:
    # `<(…)` in a shell is a pipe, and fsspec seeks in what it reads.
    with Path(path).open("rb") if is_local(fs) else fs.open(path, "rb") as file:
        data: bytes = file.read() if most_bytes is None else file.read(most_bytes + 1)
    return data


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return one_line(str(getattr(error, "strerror", None) or error)) or type(error).__name__
