"""WebDataset shards: list the images of a tar by their byte range, so that each can be read alone.

A sample is the run of members that share a name up to the first dot (https://github.com/webdataset/webdataset).
Its `.json`, `.cls` and `.txt` members ride along as the text columns `json`, `user_cls` and `txt`.
"""

import tarfile
from collections.abc import Iterator
from typing import Any

from pipeline.storage import Options, filesystem, redact

SIDECARS = ("json", "cls", "txt")
_IMAGE_SUFFIXES = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "heic", "heif", "avif", "img"}
    | {"ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "ico", "tga"}
)
_MAX_SIDECAR_BYTES = 1 << 20
# Headers lie between the images; reading ahead in blocks of this size beats one request for each header.
_READ_AHEAD_BYTES = 1 << 20


class TarSample(dict[str, Any]):
    """`name`, `offset`, `length` of one image, and the text of its sample's sidecars by suffix."""


def list_tar(uri: str, storage_options: Options) -> Iterator[TarSample]:
    """The images in the shard at `uri`, in the order of the tar.

    Raises tarfile.ReadError when the file is no uncompressed tar or ends in the middle of a header; what was
    yielded before that is good.
    """
    fs, path = filesystem(uri, storage_options)
    with (
        fs.open(path, "rb", block_size=_READ_AHEAD_BYTES, cache_type="readahead") as file,
        _open(file, uri) as shard,
    ):
        group: list[TarSample] = []
        sidecars: dict[str, str] = {}
        key = None
        for member in shard:
            if not member.isfile() or member.name.rpartition("/")[2].startswith("."):
                continue
            stem, suffix = _split(member.name)
            if stem != key:
                yield from _finish(group, sidecars)
                group, sidecars, key = [], {}, stem
            last = suffix.rpartition(".")[2]
            if last in SIDECARS and member.size <= _MAX_SIDECAR_BYTES:
                content = shard.extractfile(member)
                sidecars[last] = content.read().decode("utf-8", "replace").strip() if content else ""
            elif last in _IMAGE_SUFFIXES or not suffix:
                group.append(TarSample(name=member.name, offset=member.offset_data, length=member.size))
        yield from _finish(group, sidecars)


def _open(file: Any, uri: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.ReadError as error:
        raise tarfile.ReadError(
            f"{redact(uri)} is not an uncompressed tar ({error}); unpack a .tar.gz first, "
            "members of a compressed tar cannot be read by range"
        ) from error


def _split(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _finish(group: list[TarSample], sidecars: dict[str, str]) -> Iterator[TarSample]:
    for sample in group:
        sample.update(sidecars)
        yield sample
