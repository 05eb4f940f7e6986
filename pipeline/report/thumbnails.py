"""Small pictures of rows, found again through the manifest.

A plain address is read whole, a tar member by one ranged read, a picture inside a Parquet table from its row group.
One in a tar or table that is not the one that was listed is not shown: it may be another picture.
Nothing here ends a page: a picture that cannot be read becomes a placeholder that says why.
"""

import base64
import os
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.addresses import real_name, scheme
from pipeline.columns import holds_images
from pipeline.report.lookup import RowLookup
from pipeline.report.run import RunDirectory
from pipeline.report.shrink import shrink
from pipeline.storage import filesystem, is_local, redact
from pipeline.versions import is_header_of, same_object, same_size, same_version
from schemas.errors import SourceError
from schemas.redaction import named
from schemas.spec import FetchSpec

_MANIFEST_COLUMNS = ("row", "uri", "container", "offset", "length", "size", "etag")
_READERS = 16
_CACHED_GROUPS = 32
# Pictures in a table come in batches of full size, so that few tables are read at a time.
_TABLE_READERS, _TABLE_BATCH_ROWS = 2, 8

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Thumbnail:
    """A small picture as WebP bytes, or why there is none."""

    data: bytes | None
    reason: str = ""

    @property
    def data_uri(self) -> str | None:
        """The picture as a `data:` address."""
        return f"data:image/webp;base64,{base64.b64encode(self.data).decode()}" if self.data else None


class Thumbnailer:
    """Reads and shrinks pictures of one run. Safe to use from several threads."""

    def __init__(self, run: RunDirectory) -> None:
        self._options = run.storage_options
        # The usual limits, whatever the run had: a page that needs gigabytes for one thumbnail serves nobody.
        self._max_bytes, self._max_pixels = FetchSpec().max_bytes, FetchSpec().max_pixels
        self._image_column = str(run.record.spec.get("image_column", "image"))
        self._manifest = RowLookup(run, "manifest", _MANIFEST_COLUMNS, cached_groups=_CACHED_GROUPS)
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="thumbnail")
        self._tables = ThreadPoolExecutor(_TABLE_READERS, thread_name_prefix="thumbnail-table")

    def records(self, rows: Iterable[int]) -> dict[int, dict[str, Any]]:
        """What the manifest says of `rows`, as far as it has them."""
        return self._manifest.get(rows)

    def uris(self, rows: Iterable[int]) -> dict[int, str]:
        """The addresses of `rows`, without the secrets of signed ones."""
        return addresses(self.records(rows))

    def thumbnails(
        self,
        rows: Iterable[int],
        side: int,
        timeout_s: float | None = None,
        records: Mapping[int, Record] | None = None,
    ) -> dict[int, Thumbnail]:
        """Thumbnails of `rows`, at most `side` pixels a side, several reads at a time, the first of `rows` first.

        Those not there within `timeout_s` become placeholders. `records` are those of the rows, if they are at hand.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        wanted = list(dict.fromkeys(rows))
        if records is None:
            records = self.records(wanted)
        tables: dict[tuple[str, str | None], list[Record]] = defaultdict(list)
        jobs: dict[int, Future[bytes]] = {}
        for row in wanted:
            if (record := records.get(row)) is None:
                continue
            if record.get("container") and record.get("length") is None:
                tables[record["container"], record["etag"]].append(record)
            else:
                jobs[row] = self._pool.submit(self._from_file, record, side)
        found = {row: Thumbnail(None, "no such row in the manifest") for row in wanted if row not in records}
        reads = {
            self._tables.submit(self._from_table, *listed, members, side, deadline, found): members
            for listed, members in tables.items()
        }
        _wait([*jobs.values(), *reads], deadline)
        for row, job in jobs.items():
            found[row] = _made(job)
        for read, members in reads.items():
            reason = _why_not(read)
            for member in members:
                found.setdefault(int(member["row"]), Thumbnail(None, reason or "no such row in the table"))
        return found

    def close(self) -> None:
        """Give up what has not begun."""
        for pool in (self._tables, self._pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def _from_file(self, record: Record, side: int) -> bytes:
        container = record.get("container")
        size = record["length"] if container else record.get("size")
        if size is not None and size > self._max_bytes:
            raise SourceError(f"{size} bytes exceed the limit of {self._max_bytes}")
        if container:
            return shrink(self._member(record), side, self._max_pixels)
        fs, path = self._located(record["uri"])
        return shrink(fs.cat_file(path), side, self._max_pixels)

    def _member(self, record: Record) -> bytes:
        """A file of a tar, if it still stands where the record says: behind its header, in the tar that was listed."""
        container, start, length = record["container"], int(record["offset"]), int(record["length"])
        fs, path = self._located(container)
        if not _may_be_listed(fs, path, container, record["etag"]):
            raise _changed(container)
        begin = start - tarfile.BLOCKSIZE
        data: bytes = fs.cat_file(path, start=begin, end=start + length)
        if len(data) > tarfile.BLOCKSIZE + length:  # a web server that gives no ranges
            data = data[begin : start + length]
        try:
            header = tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise _changed(container) from error
        if not is_header_of(header, record["uri"][len(container) + 1 :], length):
            raise _changed(container)
        return data[tarfile.BLOCKSIZE :]

    def _from_table(
        self,
        container: str,
        etag: str | None,
        members: list[Record],
        side: int,
        deadline: float | None,
        found: dict[int, Thumbnail],
    ) -> None:
        """Add the rows of one table to `found`; full-size pictures go as soon as they are shrunk."""
        rows_at: dict[int, list[int]] = defaultdict(list)
        for member in members:
            rows_at[int(member["offset"])].append(int(member["row"]))
        elsewhere: dict[int, Future[bytes]] = {}
        fs, path = self._located(container)
        if etag is not None:
            known = fs.info(path)
            if not (same_size(etag, known["size"]) and same_version(etag, known)):
                raise _changed(container)
        with fs.open(path, "rb") as file, pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as part:
            column = _image_column(part.schema_arrow, self._image_column)
            for offset, cell in _cells(part, column, sorted(rows_at)):
                if isinstance(cell, str):
                    elsewhere[offset] = self._pool.submit(self._from_file, {"uri": cell}, side)
                    continue
                job = self._pool.submit(shrink, cell, side, self._max_pixels)
                _wait([job], deadline)
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError("not read in time")
                found |= dict.fromkeys(rows_at[offset], _made(job))
        _wait(elsewhere.values(), deadline)
        for offset, job in elsewhere.items():
            found |= dict.fromkeys(rows_at[offset], _made(job))

    def _located(self, address: str) -> tuple[AbstractFileSystem, str]:
        """The file system of `address` and the path on it. As the job has it, a path is one whatever it holds (`::`),
        and a name that is no UTF-8 goes by what the manifest shows."""
        fs, path = (LocalFileSystem(), address) if address.startswith("/") else filesystem(address, self._options)
        return fs, real_name(path) if is_local(fs) and not os.path.exists(path) else path


def addresses(records: Mapping[int, Record]) -> dict[int, str]:
    """The addresses in records of the manifest, without the secrets of signed ones."""
    return {row: redact(record["uri"]) for row, record in records.items()}


def _may_be_listed(fs: AbstractFileSystem, path: str, container: str, etag: str | None) -> bool:
    """As the job has it, of tars: by size on a disk, by ETag or hash in a store, and anywhere else by its word."""
    if etag is None:
        return True
    if is_local(fs):
        return same_size(etag, fs.size(path))
    return scheme(container) not in {"s3", "gs"} or same_object(etag, fs.info(path))


def _changed(container: str) -> SourceError:
    return SourceError(f"{redact(container)} has changed since it was listed")


def _image_column(schema: pa.Schema, preferred: str) -> str:
    """The column with image bytes: `preferred`, or the only one that can hold any."""
    holding = [field.name for field in schema if holds_images(field.type)]
    if preferred in holding:
        return preferred
    if len(holding) != 1:
        raise SourceError(f"no column `{preferred}` with image bytes; there are {', '.join(holding) or 'none'}")
    return str(holding[0])


def _cells(part: pq.ParquetFile, column: str, offsets: list[int]) -> Iterator[tuple[int, bytes | str | None]]:
    """The image bytes at `offsets` (row numbers of the file), holding a few rows in memory at a time; where there are
    none, the address that stands in their place."""
    start = 0
    for group in range(part.num_row_groups):
        end = start + part.metadata.row_group(group).num_rows
        inside = [offset for offset in offsets if start <= offset < end]
        position = start
        if inside:
            for batch in part.iter_batches(batch_size=_TABLE_BATCH_ROWS, row_groups=[group], columns=[column]):
                for offset in inside:
                    if position <= offset < position + len(batch):
                        yield offset, _bytes_or_address(batch.column(0)[offset - position].as_py())
                position += len(batch)
                if position > inside[-1]:
                    break
        start = end


def _bytes_or_address(cell: bytes | dict[str, Any] | None) -> bytes | str | None:
    if not isinstance(cell, dict):
        return cell
    data: bytes | None = cell.get("bytes")
    path: str = cell.get("path") or ""
    return path if data is None and "://" in path else data


def _wait(jobs: Iterable[Future[Any]], deadline: float | None) -> None:
    wait(list(jobs), timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))


def _made(job: Future[bytes]) -> Thumbnail:
    reason = _why_not(job)
    return Thumbnail(None, reason) if reason else Thumbnail(job.result())


def _why_not(job: Future[Any]) -> str:
    """Why `job` has no result; empty if it has one.

    File system drivers and decoders share no base class of errors: whatever they raised is shown as text.
    """
    if not job.done():
        job.cancel()
        return "not read in time"
    error = job.exception()
    if error is None:
        return ""
    return named(error)[:300]
