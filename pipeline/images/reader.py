"""Bytes of a file or of a stretch of it, once, from wherever it lies. Retries are the caller's."""

import contextlib
import functools
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem, sync

from pipeline.addresses import is_chained, real_name, scheme, small_scheme
from pipeline.images.archives import Archives
from pipeline.images.verdict import (
    HttpStatusError,
    TokenRefusedError,
    TruncatedBodyError,
    answered,
    changed,
    too_many_bytes,
)
from pipeline.storage import is_local, open_filesystem
from pipeline.versions import same_size
from schemas.errors import ImageError

Need = Callable[[int], None]


class Extent(NamedTuple):
    """A stretch of a file, in bytes."""

    start: int
    length: int


class Reader:
    """Reads by address. Holds the file systems it has opened; used from many threads at once.

    On S3 and Google Cloud Storage the drivers' own retries are off, so that one rule governs every scheme.
    """

    def __init__(self, storage_options: Mapping[str, Any], *, max_bytes: int, concurrency: int) -> None:
        self._options = storage_options
        self._max_bytes = max_bytes
        self._concurrency = concurrency
        self._file_systems: dict[str, AbstractFileSystem] = {}
        self._opening = threading.Lock()
        self._archives = Archives(concurrency)

    def read(self, url: str, extent: Extent | None, *, need: Need, timeout_s: float, etag: str | None = None) -> bytes:
        """The whole of `url`, or exactly `extent` of it.

        `need(nbytes)` is called before memory is spent and may raise to say that there is no room now. With `etag` an
        extent is of the file that had it when it was listed. Raises ImageError for what the address, its size or its
        ETag rules out, else whatever the driver raises.
        """
        if "://" not in url:
            return _read_local(url, extent, self._max_bytes, need, etag)
        if is_chained(url):
            ends_s = time.monotonic() + timeout_s
            with self._chained(url, timeout_s) as (fs, path):
                return _read_any(fs, path, extent, self._max_bytes, need, ends_s - time.monotonic())
        kind = scheme(url)
        fs, path = self.locate(url)
        if kind == "file" and is_local(fs):
            return _read_local(path, extent, self._max_bytes, need, etag)
        read = _READ_BY_SCHEME.get(kind)
        if read is None:
            return _read_any(fs, path, extent, self._max_bytes, need, timeout_s)
        data: bytes = sync(fs.loop, read, fs, path, extent, self._max_bytes, need, etag, timeout=max(timeout_s, 0.001))
        return data

    @contextlib.contextmanager
    def _chained(self, url: str, timeout_s: float) -> Iterator[tuple[AbstractFileSystem, str]]:
        """The file system and path of an address that leads into an archive, or through a cache."""
        member, _, archive = url.partition("::")
        if not member.partition("://")[2]:
            yield self.locate(url)
            return
        name = f"{scheme(url)}::{archive}"
        with self._archives.lent(name, lambda: self.locate(url)[0], timeout_s=timeout_s) as fs:
            yield fs, str(fs._strip_protocol(member))

    def close(self) -> None:
        """Close the archives that are kept open."""
        self._archives.close()

    def locate(self, url: str) -> tuple[AbstractFileSystem, str]:
        """The file system of `url` and the path on it."""
        kind = scheme(url)
        if kind not in _READ_BY_SCHEME:
            return open_filesystem(url, self._options)
        fs = self._file_systems.get(kind)
        if fs is None:
            with self._opening:
                fs = self._file_systems.get(kind) or self._open(kind)
                self._file_systems[kind] = fs
        return fs, url if kind == "http" else str(fs._strip_protocol(small_scheme(url)))

    def open_early(self, url: str) -> None:
        """Open the file system of `url` in the calling thread, if it is one that serves every address.

        fsspec keeps its instances, and with them connections and credentials, for each thread apart: opened by the
        threads that read, they would be set up anew in each call.
        """
        kind = scheme(url)
        if kind in _READ_BY_SCHEME and kind not in self._file_systems:
            try:
                self.locate(url)
            except Exception:  # noqa: BLE001  the row's own read meets the same error and reports it
                return

    def _open(self, kind: str) -> AbstractFileSystem:
        # Without an address, which might name a version: the drivers would then look for one in every other.
        fs, _ = open_filesystem("https://" if kind == "http" else f"{kind}://", self._options)
        if kind == "gs":
            return _single_try_gcs(fs)
        return _single_try_s3(fs, self._concurrency) if kind == "s3" else fs


_NO_TIME_S = 0.001


def _single_try_s3(fs: AbstractFileSystem, concurrency: int) -> AbstractFileSystem:
    """The same S3 access as `fs`, without the retries of s3fs and of botocore beneath it."""
    config = dict(fs.storage_options.get("config_kwargs") or {})
    config["retries"] = {"total_max_attempts": 1, "mode": "standard"}
    config["max_pool_connections"] = max(concurrency, int(config.get("max_pool_connections", 10)))
    single = type(fs)(*fs.storage_args, **{**fs.storage_options, "config_kwargs": config})
    single.retries = 1
    return single


def _single_try_gcs(fs: AbstractFileSystem) -> AbstractFileSystem:
    """The same access to Google Cloud Storage as `fs`, without the retries that gcsfs wraps around every request."""
    # gcsfs knows no such option: it makes an instance of its own, where fsspec would give the one that others write by.
    # The class for buckets with folders also asks what kind a bucket is, and again for this long.
    options = {**fs.storage_options, "single_try": True, "retry_timeout": _NO_TIME_S}
    single = type(fs)(*fs.storage_args, **options)
    single._request = functools.partial(type(fs)._request.__wrapped__, single)
    return single


def _open_local(path: str) -> int:
    # Without O_NONBLOCK, opening a named pipe that nobody writes to would wait for ever.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        if real_name(path) == path:
            raise
        return os.open(real_name(path), flags)


def _read_local(path: str, extent: Extent | None, max_bytes: int, need: Need, etag: str | None) -> bytes:
    with open(_open_local(path), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("fetch", "NotAFile", f"{path} is a folder, a pipe or a device, not a file")
        if extent is not None:
            if not same_size(etag, status.st_size):
                raise changed(path)
            need(extent.length)
            return _exactly(os.pread(file.fileno(), extent.length, extent.start), extent.length)
        if status.st_size > max_bytes:
            raise too_many_bytes(path, status.st_size, max_bytes)
        need(status.st_size)
        return _exactly(file.readall(), status.st_size)


def _free(nbytes: int) -> None:
    """The `need` of what is too little to count."""


async def _read_http(fs: Any, url: str, extent: Extent | None, max_bytes: int, need: Need, etag: str | None) -> bytes:
    from pipeline.images.http import get_bytes  # loads aiohttp, a quarter of a second that a local file need not wait

    session = await fs.set_session()
    return await get_bytes(session, url, url, extent, max_bytes=max_bytes, need=need, request=fs.kwargs)


async def _read_gcs(fs: Any, path: str, extent: Extent | None, max_bytes: int, need: Need, etag: str | None) -> bytes:
    try:
        return await _get_gcs(fs, path, extent, max_bytes, need, etag)
    except HttpStatusError as error:
        if error.status == 401:
            raise TokenRefusedError(str(error)) from None
        raise


async def _get_gcs(fs: Any, path: str, extent: Extent | None, max_bytes: int, need: Need, etag: str | None) -> bytes:
    from pipeline.images.http import get_bytes

    session = await fs._set_session()
    request = {"headers": fs._get_headers(None), "params": fs._get_params({})}
    name = f"gs://{path}"
    if extent is None or not etag:
        return await get_bytes(session, fs.url(path), name, extent, max_bytes=max_bytes, need=need, request=request)
    # An answer to a range says nothing of the whole, so the object is asked for first, then exactly that generation.
    about = fs.url(path).replace("/download/storage/", "/storage/").replace("alt=media", "alt=json")
    known = json.loads(await get_bytes(session, about, name, None, max_bytes=1 << 20, need=_free, request=request))
    if etag not in {known.get(key) for key in ("md5Hash", "crc32c", "etag")}:
        raise changed(name)
    request["params"]["ifGenerationMatch"] = known["generation"]
    try:
        return await get_bytes(session, fs.url(path), name, extent, max_bytes=max_bytes, need=need, request=request)
    except HttpStatusError as error:
        if error.status == 412:
            raise changed(name) from error
        raise


async def _read_s3(fs: Any, path: str, extent: Extent | None, max_bytes: int, need: Need, etag: str | None) -> bytes:
    bucket, key, _ = fs.split_path(path)
    version = path.partition("?versionId=")[2]
    options = {"VersionId": version} if version else {}
    if extent is not None:
        options["Range"] = f"bytes={extent.start}-{extent.start + extent.length - 1}"
        if etag:
            options["IfMatch"] = f'"{etag}"'
    try:
        response = await fs._call_s3("get_object", Bucket=bucket, Key=key, **options)
    except OSError as error:
        if "IfMatch" in options and answered(error)[0] == 412:
            raise changed(f"s3://{path}") from error
        raise
    body, size = response["Body"], response["ContentLength"]
    try:
        if size > (extent.length if extent else max_bytes):
            raise too_many_bytes(f"s3://{path}", size, max_bytes)
        need(size)
        data: bytes = await body.read()
    finally:
        body.close()
    return _exactly(data, extent.length if extent else size)


# On these one file system serves every address. Elsewhere (sftp, hdfs, chained addresses) the host is part of the
# file system, so each address is resolved on its own.
_READ_BY_SCHEME = {"http": _read_http, "gs": _read_gcs, "s3": _read_s3}


def _read_any(
    fs: AbstractFileSystem, path: str, extent: Extent | None, max_bytes: int, need: Need, timeout_s: float
) -> bytes:
    if extent is not None:
        need(extent.length)
        return _exactly(_cat(fs, path, timeout_s, extent.start, extent.start + extent.length), extent.length)
    size = fs.info(path).get("size")
    if size is not None and size > max_bytes:
        raise too_many_bytes(path, size, max_bytes)
    need(max_bytes if size is None else size)
    if size is not None:
        return _exactly(_cat(fs, path, timeout_s, None, None), size)
    data = _cat(fs, path, timeout_s, 0, max_bytes + 1)
    if len(data) > max_bytes:
        raise too_many_bytes(path, len(data), max_bytes)
    return data


def _cat(fs: AbstractFileSystem, path: str, timeout_s: float, start: int | None, stop: int | None) -> bytes:
    if isinstance(fs, AsyncFileSystem):
        data: bytes = sync(fs.loop, fs._cat_file, path, start=start, end=stop, timeout=max(timeout_s, 0.001))
        return data
    return bytes(fs.cat_file(path, start=start, end=stop))


def _exactly(data: bytes, length: int) -> bytes:
    if len(data) < length:
        raise TruncatedBodyError(f"the file ends after {len(data):,} of {length:,} bytes")
    return data
