"""Rows of a manifest to the bytes of their files, in manifest order, later files read while earlier ones decode."""

import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.images.failures import bare
from pipeline.images.parquet import TableRun
from pipeline.images.plan import Member, ObjectRead, RangeRead, Read, TableRead, plan_reads
from pipeline.images.readahead import ReadAhead, Room
from pipeline.images.reader import Extent, Reader
from pipeline.images.retry import Attempts
from pipeline.images.verdict import changed, in_pieces, too_many_bytes
from pipeline.storage import redact
from pipeline.versions import is_header_of
from schemas.errors import ImageError
from schemas.spec import FetchSpec

# Bytes of files that are being read or wait to be decoded. One file alone may be larger than that.
ROOM_BYTES = 256 << 20
# Taken for a file whose size nobody told; it asks for more when the answer says so.
GUESS_BYTES = 1 << 20
# Reads begun ahead for each thread: enough that a few that time out do not leave the decoder without work.
AHEAD_PER_THREAD = 16
_BEGINS_SPARSE = {tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME}


@dataclass(frozen=True, slots=True)
class Fetched:
    """The bytes of one file, or why there are none; seconds spent on it, all tries together."""

    result: bytes | ImageError
    seconds: float
    attempts: int


def fetch_rows(
    manifest: pa.Table, *, fetch: FetchSpec, image_column: str, storage_options: Mapping[str, Any]
) -> Iterator[Fetched]:
    """One `Fetched` for each row of `manifest`, in its order. Files too large are refused before they are read."""
    room = Room(ROOM_BYTES)
    fetcher = _Fetcher(fetch, image_column, storage_options, room)
    ahead = ReadAhead(
        fetcher.run,
        fetcher.hung,
        room=room,
        threads=fetch.concurrency,
        window=AHEAD_PER_THREAD * fetch.concurrency,
        limit_s=fetch.timeout_s,
    )
    try:
        for rows in ahead.results(fetcher.prepared(plan_reads(manifest))):
            yield from rows
    finally:
        fetcher.close()


class _Fetcher:
    """Carries out reads. Shared by the threads of one call."""

    def __init__(self, fetch: FetchSpec, image_column: str, storage_options: Mapping[str, Any], room: Room) -> None:
        self._fetch = fetch
        self._image_column = image_column
        self._reader = Reader(storage_options, max_bytes=fetch.max_bytes, concurrency=fetch.concurrency)
        self._room = room
        self._runs: dict[int, TableRun] = {}

    def close(self) -> None:
        """Let go of what stays open between reads."""
        self._reader.close()

    def prepared(self, reads: Iterator[Read]) -> Iterator[Read]:
        """The same reads, each once its file system is open. Iterate in the thread that lives longest."""
        for read in reads:
            self._reader.open_early(read.url)
            yield read

    def run(self, read: Read, ticket: int) -> list[Fetched]:
        """What `read` asks for, a `Fetched` for each of its rows. Raises nothing."""
        started = time.perf_counter()
        attempts = Attempts(read.url, self._fetch, self._room, ticket)
        results: list[bytes | ImageError]
        try:
            if isinstance(read, ObjectRead):
                results = [self._object(read, attempts)]
            elif isinstance(read, RangeRead):
                results = self._range(read, attempts)
            else:
                results = [self._table_row(read, attempts)]
        except ImageError as error:
            results = [bare(error)] * read.rows
        seconds = max(0.0, time.perf_counter() - started - attempts.waited_s) / read.rows
        return [Fetched(result, seconds, attempts.count) for result in results]

    def hung(self, read: Read) -> list[Fetched]:
        """The rows of a read that never came back."""
        if isinstance(read, TableRead):
            self._run_of(read).give_up()
        message = f"{redact(read.url)}: no answer within {self._fetch.timeout_s:g} s, and no way to interrupt the read"
        error = ImageError("fetch", "TimedOut", message, retryable=True)
        return [Fetched(error, self._fetch.timeout_s, 1)] * read.rows

    def _object(self, read: ObjectRead, attempts: Attempts) -> bytes:
        if not read.url:
            raise ImageError("fetch", "NoAddress", "the row of the table holds no address")
        if read.size is not None and read.size > self._fetch.max_bytes:
            raise _too_large(read.url, read.size, self._fetch.max_bytes)
        return self._whole(read.url, read.size, attempts)

    def _whole(self, url: str, size: int | None, attempts: Attempts) -> bytes:
        attempts.wait_for_room(GUESS_BYTES if size is None else size)
        return attempts.run(lambda left_s: self._reader.read(url, None, need=attempts.need, timeout_s=left_s))

    def _range(self, read: RangeRead, attempts: Attempts) -> list[bytes | ImageError]:
        limit = self._fetch.max_bytes
        if read.rows == 1 and read.nbytes > limit:
            raise too_many_bytes(read.url, read.nbytes, limit)
        extent = Extent(read.start - tarfile.BLOCKSIZE, read.nbytes + tarfile.BLOCKSIZE)
        attempts.wait_for_room(extent.length)
        try:
            data = self._stretch(read, extent, attempts)
        except ImageError as error:
            if error.error != "TruncatedBody" or read.rows == 1:
                raise
            return self._singly(read, attempts)
        return [self._member(read, member, data, member.offset - extent.start) for member in read.members]

    def _member(self, read: RangeRead, member: Member, data: bytes, begin: int) -> bytes | ImageError:
        """The bytes of `member`, which begin at `begin` of `data`, if it is this one that stands there."""
        if member.length > self._fetch.max_bytes:
            return too_many_bytes(read.url, member.length, self._fetch.max_bytes)
        try:
            header = tarfile.TarInfo.frombuf(data[begin - tarfile.BLOCKSIZE : begin], "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return changed(read.url)
        if not is_header_of(header, member.name, member.length):
            return in_pieces(read.url, member.name) if _is_of_pieces(header, member) else changed(read.url)
        return data[begin : begin + member.length]

    def _stretch(self, read: RangeRead, extent: Extent, attempts: Attempts) -> bytes:
        return attempts.run(
            lambda left_s: self._reader.read(read.url, extent, need=attempts.need, timeout_s=left_s, etag=read.etag)
        )

    def _singly(self, read: RangeRead, attempts: Attempts) -> list[bytes | ImageError]:
        """The container ends before the last of these members do; those before its end are there all the same."""
        results: list[bytes | ImageError] = []
        tried = attempts.count
        for member in read.members:
            attempts.restart_clock()
            attempts.count = tried
            try:
                if member.length > self._fetch.max_bytes:
                    raise too_many_bytes(read.url, member.length, self._fetch.max_bytes)
                extent = Extent(member.offset - tarfile.BLOCKSIZE, member.length + tarfile.BLOCKSIZE)
                data = self._stretch(read, extent, attempts)
                results.append(self._member(read, member, data, tarfile.BLOCKSIZE))
            except ImageError as error:
                results.append(bare(error))
        return results

    def _table_row(self, read: TableRead, attempts: Attempts) -> bytes:
        run = self._run_of(read)
        attempts.wait_for_turn(lambda: run.wait_turn(read.position))
        try:
            data, path = attempts.run(lambda _: run.take(read.position, attempts.restart_clock))
            if data is not None:
                attempts.wait_for_room(len(data))
        finally:
            run.pass_turn(read.position)
        if data is not None:
            if len(data) > self._fetch.max_bytes:
                raise too_many_bytes(read.url, len(data), self._fetch.max_bytes)
            return data
        if path is None or "://" not in path:
            raise ImageError("fetch", "NoBytes", f"row {read.run[read.position]} of {redact(read.url)} holds no image")
        attempts.url = path
        return self._whole(path, None, attempts)

    def _run_of(self, read: TableRead) -> TableRun:
        # setdefault is atomic, so that threads which come at the same time share one run
        run = self._runs.get(id(read.run))
        if run is None:
            new = TableRun(read.url, read.run, self._image_column, self._reader, read.etag)
            run = self._runs.setdefault(id(read.run), new)
        return run


def _too_large(url: str, size: int, max_bytes: int) -> ImageError:
    """Why a listed file is not read. One that holds images is a row of its own only where it is broken."""
    error = too_many_bytes(url, size, max_bytes)
    if url.partition("?")[0].lower().endswith((".tar", ".parquet")):
        hint = "a shard or table among the failures is one that cannot be listed to its end: fetch it anew"
        return ImageError("fetch", error.error, f"{error}; {hint} and run with --update")
    return error


def _is_of_pieces(header: tarfile.TarInfo, member: Member) -> bool:
    """Whether this is the first header of a sparse file: listed as no bytes behind the header with which it begins,
    which may be one of other attributes (POSIX pax) or of a long name (GNU)."""
    return not member.length and header.type in _BEGINS_SPARSE
