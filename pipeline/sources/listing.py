"""List files, folders, globs and prefixes, page by page: memory does not grow with the number of keys."""

import fnmatch
import glob
import os
import re
from collections.abc import Callable, Iterator
from urllib.parse import unquote, urlsplit

from fsspec import AbstractFileSystem

from pipeline.addresses import CACHES, absolute, file_name, scheme
from pipeline.sources.reading import source_error
from pipeline.sources.stores import Entry, crawl, list_gcs, list_s3, local_entry, walk_any, walk_local
from pipeline.storage import Options, exists, is_local, open_filesystem
from schemas.errors import SourceError

_LIST_KEYS: dict[str, Callable[[AbstractFileSystem, str, str], Iterator[Entry]]] = {"s3": list_s3, "gs": list_gcs}
_WILD = "*?["
_ENCODED_WILD = re.compile("%(?:2A|3F|5B)", re.IGNORECASE)


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
    except Exception as error:
        raise source_error(source, error) from error


def _list(source: str, storage_options: Options) -> Iterator[Entry]:
    cache, mark, behind = source.partition("::")
    if mark and cache in CACHES:
        for entry in _list(behind, storage_options):
            place = entry.uri if "://" in entry.uri else f"file://{entry.uri}"
            yield entry._replace(uri=f"{cache}::{place}")
        return
    fs, path = open_filesystem(source, storage_options)
    kind = scheme(source)
    if kind == "http":
        yield from _list_http(fs, source)
    elif is_local(fs):
        yield from _list_local(os.path.abspath(path))
    elif kind in _LIST_KEYS:
        # The drivers drop the slash at the end, by which a person says that a folder is meant.
        yield from _list_bucket(fs, kind, path.rstrip("/") + "/" * source.endswith("/"))
    else:
        yield from _list_any(fs, path, source)


def _list_local(path: str) -> Iterator[Entry]:
    if os.path.isdir(path):
        yield from walk_local(path)
    elif os.path.lexists(path):
        yield local_entry(path)
    elif not _is_glob(path):
        raise FileNotFoundError(path)
    else:
        folder = os.path.dirname(_static_prefix(path))
        if not os.path.isdir(folder):
            raise FileNotFoundError(folder)
        matches = _matcher(path)
        parts = path.split("/")
        for entry in walk_local(folder, lambda below: _leads_to(below.split("/"), parts)):
            if matches(entry.uri):
                yield entry


def _list_bucket(fs: AbstractFileSystem, kind: str, path: str) -> Iterator[Entry]:
    """The object `path` if there is one, else the folder, else what matches the glob, or all keys with the prefix."""
    list_keys = _LIST_KEYS[kind]
    bucket, _, key = path.partition("/")
    if _is_glob(bucket):
        raise SourceError(f"{kind}://{path}: the name of the bucket cannot be a pattern; name each bucket")
    if key and not key.endswith("/"):
        first = next(list_keys(fs, bucket, key), None)
        if first is not None and first.uri == f"{kind}://{bucket}/{key}":
            yield first
            return
    folder = f"{key.rstrip('/')}/"
    if key and (key != folder or _is_glob(key)) and next(list_keys(fs, bucket, folder), None) is not None:
        yield from list_keys(fs, bucket, folder)
    elif _is_glob(key):
        matches = _matcher(f"{kind}://{path}")
        for entry in list_keys(fs, bucket, _static_prefix(key)):
            if matches(entry.uri):
                yield entry
    else:
        yield from list_keys(fs, bucket, key)


def _list_http(fs: AbstractFileSystem, source: str) -> Iterator[Entry]:
    """A URL is one object as it stands, unless its path holds a `*`, or ends in `/` with no query behind it (an index
    page)."""
    _, _, path, query, fragment = urlsplit(source)
    if "*" in path:
        folder = _static_prefix(source, "*").rpartition("/")[0] + "/"
        # The folder is asked for as it stands, and an encoded character behind it stands for itself.
        pattern = glob.escape(unquote(folder)) + unquote(_ENCODED_WILD.sub(r"[\g<0>]", source.removeprefix(folder)))
        matches, parts = _matcher(pattern), pattern.rstrip("/").split("/")
        for entry in crawl(fs, folder, lambda below: _leads_to(unquote(below).rstrip("/").split("/"), parts)):
            if matches(unquote(entry.uri)):
                yield entry
    elif path.endswith("/") and not query and not fragment:
        yield from crawl(fs, source)
    else:
        yield Entry(source, None, None)


def _list_any(fs: AbstractFileSystem, path: str, source: str) -> Iterator[Entry]:
    place, mark, after = absolute(source).partition("::")
    known = address_of(fs, path, place)

    def address(name: str) -> str:
        return known(name) + mark + after

    if not _is_glob(path) or exists(fs, path):
        yield from walk_any(fs, path, address)
        return
    matches = _matcher(path)
    for entry in walk_any(fs, _static_prefix(path).rpartition("/")[0], address):
        if matches(str(fs._strip_protocol(entry.uri.removesuffix(mark + after)))):
            yield entry


def address_of(fs: AbstractFileSystem, path: str, source: str) -> Callable[[str], str]:
    """What makes of a path on `fs` an address that opens the same file system, as `source` does at `path`.

    The driver's own way back leaves out the host where that is no part of a path (ftp, sftp, smb, webhdfs, github).
    With the host stays who logs in there, as in an address on the web: nobody else could read what was listed.
    """
    if fs._get_kwargs_from_urls(fs.unstrip_protocol(path)) == fs._get_kwargs_from_urls(source):
        return lambda name: str(fs.unstrip_protocol(name))
    kind, _, place = source.partition("://")
    host, _, below = place.partition("/")
    # On Azure a path begins with the container, which is in front of the host.
    root = path.rstrip("/").removesuffix(below.rstrip("/"))
    return lambda name: f"{kind}://{host}/{name.removeprefix(root).lstrip('/')}"


def _is_glob(path: str) -> bool:
    return any(character in path for character in _WILD)


def _static_prefix(pattern: str, wild: str = _WILD) -> str:
    return pattern[: min(pattern.index(character) for character in wild if character in pattern)]


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a path is what `pattern` names: `*` and `?` stay within a segment, `**` spans any number of them.

    As in a shell, a folder that matches stands for everything in it.
    """
    expression = re.compile(_expression(pattern))
    return lambda path: expression.match(path) is not None


def _expression(pattern: str) -> str:
    segments = pattern.rstrip("/").split("/")
    text = ""
    for number, segment in enumerate(segments):
        last = number == len(segments) - 1
        if segment == "**":
            text += ".*" if last else "(?:[^/]+/)*"
        else:
            text += _segment_expression(segment) + ("" if last else "/")
    return rf"(?s:{text})(?:/|\Z)"


_TOKEN = re.compile(r"\*+|\?|\[(!?)(\]?[^\]]*)\]|.", re.DOTALL)


def _segment_expression(segment: str) -> str:
    return _TOKEN.sub(_token_expression, segment)


def _token_expression(token: re.Match[str]) -> str:
    if token[2] is not None:
        members = re.sub(r"([\\\[\]^&~|])", r"\\\1", token[2])
        return f"(?!/)[{'^' if token[1] else ''}{members}]"
    return {"*": "[^/]*", "?": "[^/]"}.get(token[0][0], re.escape(token[0]))


def _leads_to(folder: list[str], pattern: list[str]) -> bool:
    """Whether something in `folder` (its segments) may match `pattern`."""
    for name, wanted in zip(folder, pattern, strict=False):
        if wanted == "**":
            return True
        if not fnmatch.fnmatchcase(name, wanted):
            return False
    return True


def wanted(uri: str, include: tuple[str, ...], exclude: tuple[str, ...], container: str = "") -> bool:
    """Whether `uri`, which may name a row of the shard or table `container`, passes `--include` and `--exclude`."""
    return (not include or named_by(uri, include, container)) and not named_by(uri, exclude, container)


def named_by(uri: str, patterns: tuple[str, ...], container: str = "") -> bool:
    """Whether a pattern fits the whole URI or the name of the file; here `*` spans slashes."""
    if container and uri.startswith(f"{container}#"):
        name = f"{file_name(container)}{uri.removeprefix(container)}".rpartition("/")[2]
    else:
        name = file_name(uri)
    return any(fnmatch.fnmatchcase(uri, pattern) or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
