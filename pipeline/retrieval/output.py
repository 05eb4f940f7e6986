"""Writing results: every file appears whole or not at all, on a disk and on an object store."""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from pipeline.storage import exists, is_local, join, put_bytes, write_error
from schemas.errors import SpecError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str) -> str:
    """`name` if it can be a folder's name on every store. Raises SpecError otherwise."""
    if not _NAME.fullmatch(name):
        raise SpecError(f"--name {name!r}: use letters, digits, `.`, `_` and `-`, beginning with a letter or digit")
    return name


@contextmanager
def staged(fs: AbstractFileSystem, path: str) -> Iterator[Path]:
    """A local file to write; it becomes `path` when the block ends well, and vanishes when it does not.

    Raises OutputError naming the path when the place is full, gone or denied.
    """
    folder, _, name = path.rpartition("/")
    try:
        if is_local(fs):
            Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".staged-", dir=folder if is_local(fs) else None) as temporary:
            local = Path(temporary, name)
            yield local
            if is_local(fs):
                local.replace(path)
            else:
                fs.put_file(str(local), path)
    except OSError as error:
        raise write_error(path, error) from error


def write_table(fs: AbstractFileSystem, path: str, table: pa.Table) -> None:
    """`table` as one Parquet file at `path`."""
    with staged(fs, path) as local:
        pq.write_table(table, local, compression="zstd")


def write_json(fs: AbstractFileSystem, path: str, content: dict[str, Any]) -> None:
    """`content` as indented JSON; NaN is refused, since it is not JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    put_bytes(fs, path, (text + "\n").encode())


def remove_folder(fs: AbstractFileSystem, folder: str) -> None:
    """Delete the results of an earlier command of the same name, if there are any."""
    if exists(fs, folder):
        fs.rm(folder, recursive=True)


def list_folders(fs: AbstractFileSystem, folder: str) -> list[str]:
    """Names of the visible folders under `folder`, sorted; none where it does not exist."""
    try:
        entries = fs.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = [str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]
    return sorted(name for name in names if _NAME.fullmatch(name))


def place(root: str, kind: str, name: str) -> str:
    """`root/kind/name`, with the name checked."""
    return join(root, kind, check_name(name))
