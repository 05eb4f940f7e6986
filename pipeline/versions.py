"""Whether a tar or a table is still the one that was listed: its rows are places in that one."""

import re
import tarfile
from collections.abc import Mapping
from typing import Any


def same_size(etag: str | None, size: int) -> bool:
    """Whether a file of `size` bytes may be the one that was listed. Where the ETag ends with a size, that decides: a
    time that differs may come from a copy."""
    told = re.search(r"-([0-9a-f]+)$", etag or "")
    return told is None or int(told[1], 16) == size


def same_version(etag: str | None, known: Mapping[str, Any]) -> bool:
    """Whether a table with these facts may be the one that was listed with `etag`, which ends with the size. Stores
    without an ETag have nothing to be held against it."""
    return same_object((etag or "").rpartition("-")[0], known)


def same_object(etag: str | None, known: Mapping[str, Any]) -> bool:
    """Whether an object with these facts may be the one that was listed with `etag`, as its store gave it."""
    told = _bare(etag or "")
    now = {_bare(str(known[key])) for key in ("ETag", "md5Hash", "crc32c", "etag") if known.get(key)}
    return not told or not now or told in now


def _bare(etag: str) -> str:
    """Drivers give it as the header has it, in quotes and perhaps marked as weak (RFC 9110, 8.8.3), or without."""
    return etag.removeprefix("W/").strip('"')


def is_header_of(header: tarfile.TarInfo, name: str, length: int) -> bool:
    """Whether this is the tar header (POSIX ustar) of the member `name` of `length` bytes.

    Names that are long or not ASCII stand in a header of their own, and cut short or not at all in this one. Some
    writers (tar-stream) put every name that other attributes go with there, and a mere word in this one.
    """
    plain = name.isascii() and "\\udc" not in name  # so the manifest shows bytes that are no UTF-8
    told = plain and len(name) <= tarfile.LENGTH_NAME and not header.name.startswith("PaxHeader")
    return header.size == length and (header.name == name or not told)
