"""Open an object for reading at any place in it, whatever the store, with faults that pass tried again.

A freeze either sees all of a source or ends with an error: a table or shard that is cut short by a lost connection
must not become a manifest that is cut short.
"""

import contextlib
import gzip
import io
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from pipeline.storage import Options, is_local, open_filesystem, redact
from pipeline.store_errors import TRANSIENT_STATUS, lacks_credentials
from schemas.errors import SourceError
from schemas.redaction import named, one_line

T = TypeVar("T")

_GZIP = b"\x1f\x8b"
_TRIES = 5
_BASE_S = 0.2
# What is read at a time grows while reading goes on in one direction and starts over after a leap.
_LEAST_BYTES = 256 << 10
_MOST_BYTES = 8 << 20


@contextlib.contextmanager
def open_object(uri: str, storage_options: Options) -> Iterator[BinaryIO]:
    """`uri` as a seekable binary file. Raises SourceError where it cannot be read."""
    try:
        fs, path = open_filesystem(uri, storage_options)
    except SourceError:
        raise
    except Exception as error:
        raise source_error(uri, error) from error
    with _open(fs, path, uri) as file:
        yield file


@contextlib.contextmanager
def open_unpacked(uri: str, storage_options: Options) -> Iterator[BinaryIO]:
    """`open_object`; where gzip has packed it, what it has packed, as a `gzip.GzipFile`."""
    with open_object(uri, storage_options) as file:
        packed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        if not packed:
            yield file
            return
        with gzip.open(file, "rb") as unpacked:
            yield unpacked  # type: ignore[misc]


def _open(fs: AbstractFileSystem, path: str, uri: str) -> BinaryIO:
    if is_local(fs) or not isinstance(fs, AsyncFileSystem):
        opened: BinaryIO = patiently(uri, lambda: fs.open(path, "rb"))
        return opened
    info = patiently(uri, lambda: fs.info(path))
    if info.get("size") is None or info.get("partial") is False:
        return _download(fs, path, uri)
    return io.BufferedReader(_RangeReader(fs, path, uri, int(info["size"])), _LEAST_BYTES)


def _download(fs: AbstractFileSystem, path: str, uri: str) -> BinaryIO:
    """A copy on the local disk, for servers that give no ranges; gone when it is closed."""
    with tempfile.NamedTemporaryFile(prefix="patchstream-") as named:
        patiently(uri, lambda: fs.get_file(path, named.name))
        return open(named.name, "rb")


class _RangeReader(io.RawIOBase):
    """Reads by ranged requests. Small ones where headers are far apart, large ones where everything is wanted."""

    def __init__(self, fs: AbstractFileSystem, path: str, uri: str, size: int) -> None:
        self._fs, self._path, self._uri, self._size = fs, path, uri, size
        self._place = 0
        self._start = 0
        self._block = b""
        self._ahead = _LEAST_BYTES
        self._copy: BinaryIO | None = None

    def close(self) -> None:
        if self._copy is not None:
            self._copy.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), self._size - self._place)
        if wanted <= 0:
            return 0
        inside = self._place - self._start
        if not 0 <= inside < len(self._block):
            self._load(wanted)
            inside = 0
        piece = self._block[inside : inside + wanted]
        buffer[: len(piece)] = piece
        self._place += len(piece)
        return len(piece)

    def _load(self, wanted: int) -> None:
        leap = self._place - (self._start + len(self._block))
        onward = bool(self._block) and 0 <= leap <= self._ahead
        self._ahead = min(_MOST_BYTES, 2 * self._ahead) if onward else _LEAST_BYTES
        start, stop = self._place, min(self._size, self._place + max(wanted, self._ahead))
        self._start, self._block = start, patiently(self._uri, lambda: self._fetch(start, stop))

    def _fetch(self, start: int, stop: int) -> bytes:
        if self._copy is not None:
            self._copy.seek(start)
            return self._copy.read(stop - start)
        data: bytes = self._fs.cat_file(self._path, start=start, end=stop)
        if len(data) == self._size != stop - start:
            # The server gave the whole file, whatever was asked for, and would each time.
            self._keep(data)
            return data[start:stop]
        if len(data) != stop - start:
            raise ConnectionError(f"{len(data):,} bytes came instead of {stop - start:,}")
        return data

    def _keep(self, data: bytes) -> None:
        """Where there is no room for a copy, the server is asked each time."""
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            copy = opened.enter_context(tempfile.TemporaryFile(prefix="patchstream-"))
            copy.write(data)
            copy.flush()
            self._copy = copy
            opened.pop_all()  # it is closed with the reader


def patiently(uri: str, call: Callable[[], T]) -> T:
    """`call()`, again with growing pauses as long as that may help. Raises SourceError.

    The drivers of S3 and Google Cloud Storage try again by themselves; that of HTTP does not.
    """
    for attempt in range(1, _TRIES + 1):
        try:
            return call()
        except SourceError:
            raise
        except Exception as error:
            if attempt == _TRIES or not _may_pass(error):
                raise source_error(uri, error) from error
            time.sleep(random.uniform(0, _BASE_S * 2**attempt))
    raise AssertionError("unreachable")


def source_error(uri: str, error: BaseException) -> SourceError:
    """What an exception of a driver means for a source, in words: the address, the cause, the way out."""
    place, cause = redact(uri), _cause(error)
    detail = one_line(str(cause)) or type(cause).__name__
    status = _status(cause)
    if isinstance(cause, FileNotFoundError) or status == 404:
        return SourceError(f"{place}: no such file, folder or prefix")
    if isinstance(cause, PermissionError) or status in {401, 403} or detail.startswith("Forbidden"):
        return SourceError(f"{place}: access is denied; check the credentials and their rights ({detail})")
    if lacks_credentials(cause):
        return SourceError(
            f"{place}: no credentials were found ({detail}); give them by environment, profile or --storage-options, "
            'or say {"anon": true} for a public bucket'
        )
    return SourceError(f"{place}: cannot be read ({named(cause)})")


def _cause(error: BaseException) -> BaseException:
    """fsspec's HTTP calls every failure to look at a URL a missing file; the true reason is behind it."""
    inner = error.__cause__
    other = inner is not None and (_from_http(inner) or isinstance(inner, OSError | TimeoutError | TypeError))
    return inner if inner is not None and other and isinstance(error, FileNotFoundError) else error


def _from_http(error: BaseException) -> bool:
    return any(kind.__module__.startswith("aiohttp") for kind in type(error).__mro__)


def _may_pass(error: Exception) -> bool:
    cause = _cause(error)
    status = _status(cause)
    if status is not None:
        return status in TRANSIENT_STATUS
    if isinstance(cause, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    return isinstance(cause, ConnectionError | TimeoutError) or _from_http(cause)


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None
