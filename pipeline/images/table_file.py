"""The file behind a Parquet table, as Arrow reads it: by ranges, or whole where a web server gives none."""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import IO

import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.asyn import sync
from fsspec.callbacks import Callback

from pipeline.addresses import CACHES, real_name, scheme
from pipeline.images.reader import Reader
from pipeline.images.verdict import changed
from pipeline.storage import is_local, redact
from pipeline.store_errors import NO_ROOM
from pipeline.versions import same_size, same_version
from schemas.errors import ImageError

_READ_BYTES = 4 << 20
_SILENCE_S = 60.0  # of a web server that sends a whole table


class TableFile:
    """Passes reads on, and remembers whether one failed: what Arrow raises otherwise is the fault of the table."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failed = False

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        self._file.close()

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self._noted():
            return self._file.seek(offset, whence)

    def read(self, nbytes: int = -1) -> bytes:
        with self._noted():
            return self._file.read(nbytes)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.failed = True
            raise


@contextlib.contextmanager
def open_table(
    reader: Reader, url: str, etag: str | None, progress: Callable[[], None]
) -> Iterator[tuple[TableFile, pq.ParquetFile]]:
    """The table that was listed with `etag`. `progress` is called while a copy of it is made.

    Raises ImageError `Changed` for another one, `StorageError` where the disk has no room for a copy.
    """
    fs, path = reader.locate(url)
    if is_local(fs) and not os.path.exists(path):
        path = real_name(path)
    # A cache of fsspec says itself how what is behind it is read.
    options = {} if scheme(url) in CACHES else {"block_size": _READ_BYTES, "cache_type": "readahead"}
    with contextlib.ExitStack() as opened:
        file = TableFile(opened.enter_context(fs.open(path, "rb", **options)))
        try:
            parquet = _checked(file, fs, path, url, etag)
        except ValueError:  # so fsspec says that it would have to read on from the beginning
            if not file.failed or scheme(url) != "http":
                raise
            file = TableFile(opened.enter_context(_copied(fs, path, url, progress)))
            parquet = _checked(file, fs, path, url, etag)
        yield file, parquet


def _checked(file: TableFile, fs: AbstractFileSystem, path: str, url: str, etag: str | None) -> pq.ParquetFile:
    file.seek(0, os.SEEK_END)
    if not (same_size(etag, file.tell()) and same_version(etag, fs.info(path))):
        raise changed(url)
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)


@contextlib.contextmanager
def _copied(fs: AbstractFileSystem, path: str, url: str, progress: Callable[[], None]) -> Iterator[IO[bytes]]:
    """A copy in the folder for temporary files, without a name there, so that no death leaves it behind."""
    import aiohttp

    silence = aiohttp.ClientTimeout(total=None, sock_read=_SILENCE_S)
    get = functools.partial(fs._get_file, timeout=silence)  # `sync` has a time limit of its own by this name
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(tempfile.TemporaryFile(prefix="patchstream-"))
            sync(fs.loop, get, path, file, callback=_Progress(progress))
            file.flush()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            message = (
                f"{redact(url)}: its server gives no byte ranges, and {tempfile.gettempdir()} has no room for a copy; "
                "free some space, set TMPDIR, or serve the table from a store that knows ranges"
            )
            raise ImageError("fetch", "StorageError", message, retryable=True) from error
        yield file


class _Progress(Callback):  # type: ignore[misc]
    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__()
        self._call = call

    def relative_update(self, inc: int = 1) -> None:
        self._call()
