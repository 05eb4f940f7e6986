"""List files, folders, globs and prefixes, page by page: memory does not grow with the number of keys."""

import fnmatch
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem

from pipeline.storage import Options, filesystem, is_local, redact, scheme
from schemas.errors import SourceError

_PAGE = 1000


class Entry(NamedTuple):
    """One object. `etag` changes when the content does; None where the store has no such thing."""

    uri: str
    size: int | None
    etag: str | None


def list_source(source: str, storage_options: Options) -> Iterator[Entry]:
    """Every object that `source` names, in the store's order.

    `source` is a file, a folder (recursive), a glob, or a key prefix. Hidden files are files like any other: what
    is not wanted is left out with `--exclude`, so that the count of rows is the count of files.
    Raises SourceError when the place cannot be listed or does not exist.
    """
    try:
        yield from _list(source, storage_options)
    except SourceError:
        raise
    except FileNotFoundError:
        raise SourceError(f"{redact(source)}: no such file, folder or prefix") from None
    except PermissionError as error:
        raise SourceError(f"{redact(source)}: listing is denied; check the credentials ({error})") from error
    except OSError as error:
        raise SourceError(f"{redact(source)}: cannot be listed ({type(error).__name__}: {error})") from error


def _list(source: str, storage_options: Options) -> Iterator[Entry]:
    fs, path = filesystem(source, storage_options)
    kind = scheme(source)
    if kind == "http":
        yield from _list_http(fs, source)
        return
    if is_local(fs):
        path = os.path.abspath(path)
        if os.path.isfile(path):
            yield _local_entry(path)
            return
        if os.path.isdir(path):
            yield from _walk_local(path)
            return
    pattern = path if _has_glob(path) else None
    base = _static_prefix(path) if pattern else path
    for entry in _list_prefix(fs, kind, base, exact=pattern is None):
        if pattern is None or _glob_match(fs._strip_protocol(entry.uri), pattern):
            yield entry


def _list_prefix(fs: AbstractFileSystem, kind: str, base: str, exact: bool) -> Iterator[Entry]:
    if kind in _LIST_KEYS:
        yield from _list_bucket(fs, kind, base, exact)
    elif is_local(fs):
        folder = base if os.path.isdir(base) else os.path.dirname(base)
        if exact or not os.path.isdir(folder):
            raise FileNotFoundError(base)
        yield from _walk_local(folder)
    else:
        yield from _walk_any(fs, base)


def _list_bucket(fs: AbstractFileSystem, kind: str, base: str, exact: bool) -> Iterator[Entry]:
    """The object `base` if there is one, else the folder `base/`, else every key that begins with `base`."""
    list_keys = _LIST_KEYS[kind]
    bucket, _, key = base.partition("/")
    if exact and key and not key.endswith("/"):
        first = next(list_keys(fs, bucket, key), None)
        if first is not None and first.uri == f"{kind}://{bucket}/{key}":
            yield first
            return
        if next(list_keys(fs, bucket, f"{key}/"), None) is not None:
            key = f"{key}/"
    yield from list_keys(fs, bucket, key)


def _local_entry(path: str) -> Entry:
    status = os.stat(path)
    return Entry(os.path.abspath(path), status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}")


def _walk_local(folder: str) -> Iterator[Entry]:
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if os.path.realpath(os.path.join(root, name)) not in seen)
        for name in sorted(files):
            path = os.path.join(root, name)
            yield _local_entry(path) if os.path.exists(path) else Entry(os.path.abspath(path), None, None)


def _list_s3(fs: AbstractFileSystem, bucket: str, prefix: str) -> Iterator[Entry]:
    token: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=_PAGE, **token)
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):  # a folder marker is no object
                yield Entry(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def _list_gcs(fs: AbstractFileSystem, bucket: str, prefix: str) -> Iterator[Entry]:
    token: dict[str, str] = {}
    while True:
        page: dict[str, Any] = fs.call("GET", "b/{}/o", bucket, prefix=prefix, maxResults=_PAGE, json_out=True, **token)
        for item in page.get("items", []):
            if not item["name"].endswith("/"):
                etag = item.get("md5Hash") or item.get("etag")
                yield Entry(f"gs://{bucket}/{item['name']}", int(item["size"]), etag)
        if not page.get("nextPageToken"):
            return
        token = {"pageToken": page["nextPageToken"]}


_LIST_KEYS: dict[str, Callable[[AbstractFileSystem, str, str], Iterator[Entry]]] = {"s3": _list_s3, "gs": _list_gcs}


def _list_http(fs: AbstractFileSystem, source: str) -> Iterator[Entry]:
    path = urlsplit(source).path
    if "*" in path:
        for url in sorted(fs.glob(source)):
            yield Entry(str(url), None, None)
    elif path.endswith("/"):
        for url in sorted(fs.find(source)):
            yield Entry(str(url), None, None)
    else:
        yield Entry(source, None, None)


def _walk_any(fs: AbstractFileSystem, base: str) -> Iterator[Entry]:
    if fs.isfile(base):
        yield _any_entry(fs, fs.info(base))
        return
    if not fs.exists(base):
        raise FileNotFoundError(base)
    for _, _, files in fs.walk(base, detail=True):
        for _, info in sorted(files.items()):
            yield _any_entry(fs, info)


def _any_entry(fs: AbstractFileSystem, info: dict[str, Any]) -> Entry:
    etag = next((str(info[key]) for key in ("ETag", "etag", "md5", "mtime", "created") if info.get(key)), None)
    return Entry(str(fs.unstrip_protocol(info["name"])), info.get("size"), etag)


def _has_glob(path: str) -> bool:
    return any(character in path for character in "*?[")


def _static_prefix(pattern: str) -> str:
    first = min(pattern.index(character) for character in "*?[" if character in pattern)
    return pattern[:first]


def _glob_match(path: str, pattern: str) -> bool:
    """`*` and `?` stay within one path segment, `**` spans any number of them."""
    return _match_segments(path.split("/"), pattern.split("/"))


def _match_segments(path: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_match_segments(path[skip:], pattern[1:]) for skip in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _match_segments(path[1:], pattern[1:])


def wanted(uri: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> bool:
    """Whether `uri` passes `--include` and `--exclude`: glob patterns on the whole URI or on its last segment."""
    name = uri.rpartition("/")[2]

    def matches(patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatch(uri, pattern) or fnmatch.fnmatch(name, pattern) for pattern in patterns)

    return (not include or matches(include)) and not matches(exclude)
