"""One way to reach a file, whatever the scheme: fsspec, with credentials the ecosystem's way.

`storage_options` is either flat (`{"anon": true}`: for every remote scheme) or keyed by scheme
(`{"s3": {...}, "gs": {...}}`). Endpoints and credentials otherwise come from the environment and the profiles that
s3fs, gcsfs and aiohttp read themselves.
"""

import errno
import json
import os
import re
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from schemas.errors import OutputError, PatchstreamError, SourceError

Options = Mapping[str, Any]

_ALIASES = {"gcs": "gs", "s3a": "s3", "https": "http", "local": "file"}


def scheme(url: str) -> str:
    """`file`, `s3`, `gs`, `http`, …; aliases such as `https`, `s3a` and `gcs` folded into one name."""
    protocol = str(get_protocol(url))
    return _ALIASES.get(protocol, protocol)


def options_for(url: str, storage_options: Options) -> dict[str, Any]:
    """The part of `storage_options` that concerns the scheme of `url`."""
    name = scheme(url)
    if storage_options and all(isinstance(value, dict) for value in storage_options.values()):
        by_scheme = {_ALIASES.get(key, key): value for key, value in storage_options.items()}
        return dict(by_scheme.get(name, {}))
    return {} if name == "file" else dict(storage_options)


def filesystem(url: str, storage_options: Options) -> tuple[AbstractFileSystem, str]:
    """The file system that serves `url`, and the path of `url` on it.

    Listings are never cached: a bucket changes while a job runs. Instances are cached by fsspec for each process.
    Raises SourceError for a scheme that fsspec does not know or whose driver is not installed.
    """
    options = options_for(url, storage_options)
    if scheme(url) in {"s3", "gs"}:
        options.setdefault("use_listings_cache", False)
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise SourceError(f"{redact(url)}: no file system for this address ({error})") from error
    return fs, str(path)


def is_local(fs: AbstractFileSystem) -> bool:
    """Whether paths of `fs` are paths of this machine."""
    return isinstance(fs, LocalFileSystem)


_SECRET_KEY = re.compile(r"sig|token|key|secret|credential|password|expires|policy", re.IGNORECASE)


def redact(url: str) -> str:
    """`url` without user, password and the values of signed query parameters. Safe to print and to store."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    query = "&".join(_redact_parameter(item) for item in parts.query.split("&")) if parts.query else ""
    return urlunsplit((parts.scheme, host, parts.path, query, parts.fragment))


def _redact_parameter(item: str) -> str:
    name, equals, _ = item.partition("=")
    return f"{name}{equals}…" if equals and _SECRET_KEY.search(name) else item


def join(base: str, *names: str) -> str:
    """`base/name/…`, for paths and URLs alike."""
    return "/".join([base.rstrip("/"), *names])


def put_bytes(fs: AbstractFileSystem, path: str, data: bytes) -> None:
    """Write a file that appears whole or not at all.

    An object store makes a single put visible when it is complete; on a disk the data goes to a hidden name first
    and is renamed. Raises OutputError naming the path when the place is full, gone or denied.
    """
    try:
        if not is_local(fs):
            fs.pipe_file(path, data)
            return
        folder, _, name = path.rpartition("/")
        fs.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fs.mv(temporary, path)
        finally:
            if fs.exists(temporary):
                fs.rm_file(temporary)
    except PatchstreamError:
        raise
    except Exception as error:
        raise write_error(path, error) from error


def create_bytes(fs: AbstractFileSystem, path: str, data: bytes) -> bool:
    """Write a file only if it does not exist yet. False if somebody else was first.

    Atomic on a disk (`O_EXCL`), S3 (`If-None-Match`) and Google Cloud Storage (`ifGenerationMatch`).
    """
    try:
        if is_local(fs):
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            with open(path, "xb") as file:
                file.write(data)
            return True
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    except Exception as error:
        if "PreconditionFailed" in repr(error) or "412" in repr(error):
            return False
        raise write_error(path, error) from error
    return True


def read_json(fs: AbstractFileSystem, path: str) -> Any:
    """The JSON document at `path`, or None where there is none."""
    try:
        return json.loads(fs.cat_file(path))
    except FileNotFoundError:
        return None


_CAUSES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the quota is used up; free some space",
    errno.EROFS: "the file system is read-only; choose another --out",
    errno.EACCES: "writing there is denied; check the permissions",
    errno.EPERM: "writing there is denied; check the permissions",
    errno.ENOENT: "the folder or bucket does not exist (any more)",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another --out",
}


def write_error(path: str, error: Exception) -> OutputError:
    """An OutputError that names the path, the cause, and what stays."""
    code = getattr(error, "errno", None)
    if isinstance(error, PermissionError):
        code = errno.EACCES
    elif isinstance(error, FileNotFoundError):
        code = errno.ENOENT
    cause = _CAUSES.get(code, "") if isinstance(code, int) else ""
    detail = f"{cause} ({error})" if cause else f"{type(error).__name__}: {error}"
    return OutputError(
        f"cannot write {redact(path)}: {detail}. What was committed stays; the same command goes on from there."
    )
