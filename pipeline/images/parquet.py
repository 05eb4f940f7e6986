"""Image bytes out of a Parquet table: one pass over the row groups that hold wanted rows, whatever their size."""

import bisect
import os
import threading
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.images.reader import Reader, same_size, same_version
from pipeline.images.verdict import changed
from pipeline.storage import redact
from schemas.errors import ImageError

# Bytes and path of an image, either of which may be None.
Value = tuple[bytes | None, str | None]

# How much a batch of rows should come to. Row groups may hold gigabytes; pages are decoded as they are needed.
_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 64
_READ_BYTES = 4 << 20


class TableRun:
    """Wanted rows of one table, ascending, taken one after the other by the threads that ask for them.

    Each position has a turn, so that the table is read once and in order although many threads wait for rows.
    """

    def __init__(
        self, url: str, rows: tuple[int, ...], image_column: str, reader: Reader, etag: str | None = None
    ) -> None:
        self.url = url
        self._etag = etag
        self._rows = rows
        self._column = image_column
        self._reader = reader
        self._turns = [threading.Event() for _ in rows]
        self._turns[0].set()
        self._values: Iterator[Value] | None = None
        self._dead = False

    def wait_turn(self, position: int) -> None:
        """Wait until the rows before `position` have been taken."""
        self._turns[position].wait()

    def pass_turn(self, position: int) -> None:
        """Let the next row be taken."""
        if position + 1 < len(self._turns):
            self._turns[position + 1].set()

    def give_up(self) -> None:
        """The table hangs: fail every row that is still to come."""
        self._dead = True
        for turn in self._turns:
            turn.set()

    def take(self, position: int) -> Value:
        """The row at `position`.

        Call between `wait_turn` and `pass_turn`. After an exception the next call opens the table afresh.
        """
        if self._dead:
            raise ImageError("fetch", "TimedOut", "reading the table hangs", retryable=True)
        values, self._values = self._values, None
        if values is None:
            values = self._read(position)
        value = next(values)
        if position + 1 < len(self._rows):
            self._values = values
        return value

    def _read(self, position: int) -> Iterator[Value]:
        fs, path = self._reader.locate(self.url)
        wanted = self._rows[position:]
        taken = 0
        with fs.open(path, "rb", block_size=_READ_BYTES, cache_type="readahead") as file:
            file.seek(0, os.SEEK_END)
            if not (same_size(self._etag, file.tell()) and same_version(self._etag, fs.info(path))):
                raise changed(self.url)
            parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
            column = _image_column(parquet.schema_arrow, self._column)
            for first, values in _batches(parquet, column, wanted):
                while taken < len(wanted) and wanted[taken] < first + len(values):
                    yield _value(values[wanted[taken] - first])
                    taken += 1
            rows = parquet.metadata.num_rows
        message = f"{redact(self.url)} has {rows} rows; row {wanted[taken]} does not exist (any more)"
        raise ImageError("fetch", "NotFound", message)


def _batches(parquet: pq.ParquetFile, column: str, wanted: tuple[int, ...]) -> Iterator[tuple[int, pa.Array]]:
    """(first row, values) of the batches of those row groups that hold wanted rows."""
    first = 0
    for group in range(parquet.num_row_groups):
        metadata = parquet.metadata.row_group(group)
        place = bisect.bisect_left(wanted, first)
        if place < len(wanted) and wanted[place] < first + metadata.num_rows:
            chunks = [metadata.column(i) for i in range(metadata.num_columns)]
            held = sum(chunk.total_uncompressed_size for chunk in chunks if _belongs(chunk.path_in_schema, column))
            rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * metadata.num_rows // max(held, 1)))
            start = first
            for batch in parquet.iter_batches(batch_size=rows, row_groups=[group], columns=[column]):
                yield start, batch.column(0)
                start += batch.num_rows
        first += metadata.num_rows


def _belongs(path: str, column: str) -> bool:
    return path == column or path.startswith(f"{column}.")


def _value(scalar: pa.Scalar) -> Value:
    value = scalar.as_py()
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path")
    return value, None


def _image_column(schema: pa.Schema, name: str) -> str:
    """`name` where it holds images, else the only column that does: the rule by which the table was listed."""
    candidates = [field.name for field in schema if _holds_images(field.type)]
    if name in candidates:
        return name
    if len(candidates) == 1:
        return str(candidates[0])
    raise ImageError("fetch", "NoImageColumn", f"the table has no column `{name}` with image bytes (any more)")


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return {"bytes", "path"} <= names and _holds_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))
