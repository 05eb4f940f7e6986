"""Image bytes out of a Parquet table: one pass over the row groups that hold wanted rows, whatever their size."""

import bisect
import copy
import functools
import sys
import threading
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.columns import held_bytes, holds_images, places_of
from pipeline.images.reader import Reader
from pipeline.images.table_file import TableFile, open_table
from pipeline.images.verdict import scrub
from pipeline.storage import redact
from schemas.errors import ImageError

# Bytes and path of an image, either of which may be None.
Value = tuple[bytes | None, str | None]

# How much a batch of rows should come to. Row groups may hold gigabytes; pages are decoded as they are needed.
_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 64


class _DamageError(Exception):
    """A row group cannot be decoded from the row `start` on; the next one begins at `stop`."""

    def __init__(self, start: int, stop: int, cause: str) -> None:
        super().__init__(f"rows {start} to {stop - 1}: the row group is damaged there ({cause})")
        self.stop = stop


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
        self._progress: Callable[[], None] = lambda: None
        # What all rows below this number get, without the table being read again.
        self._lost_below = 0
        self._lost = ImageError("fetch", "Corrupt", "")

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

    def take(self, position: int, progress: Callable[[], None]) -> Value:
        """The row at `position`. `progress` is called for whatever is read and skipped on the way to it.

        Call between `wait_turn` and `pass_turn`. After an exception the next call opens the table afresh, unless what
        was found holds for its row too.
        """
        if self._rows[position] < self._lost_below:
            raise copy.copy(self._lost)
        self._check()
        self._progress = progress
        values, self._values = self._values, None
        if values is None:
            values = self._read(position)
        value = next(values)
        if position + 1 < len(self._rows):
            self._values = values
        return value

    def _check(self) -> None:
        if self._dead:
            raise ImageError("fetch", "TimedOut", "reading the table hangs", retryable=True)

    def _go_on(self) -> None:
        self._check()
        self._progress()

    def _read(self, position: int) -> Iterator[Value]:
        wanted = self._rows[position:]
        taken = 0
        try:
            with open_table(self._reader, self.url, self._etag, self._go_on) as (file, parquet):
                column = _image_column(parquet.schema_arrow, self._column)
                for first, values in _batches(file, parquet, column, wanted):
                    self._go_on()
                    while taken < len(wanted) and wanted[taken] < first + len(values):
                        yield _value(values[wanted[taken] - first])
                        taken += 1
                rows = parquet.metadata.num_rows
        except _DamageError as error:
            message = f"{redact(self.url)}, {error}"
            self._lost, self._lost_below = ImageError("fetch", "Corrupt", message), error.stop
            raise copy.copy(self._lost) from error
        except ImageError as error:
            self._lost, self._lost_below = copy.copy(error), sys.maxsize
            raise
        message = f"{redact(self.url)} has {rows} rows; row {wanted[taken]} does not exist (any more)"
        raise ImageError("fetch", "NotFound", message)


def _batches(
    file: TableFile, parquet: pq.ParquetFile, column: str, wanted: tuple[int, ...]
) -> Iterator[tuple[int, pa.Array]]:
    """(first row, values) of the batches of those row groups that hold wanted rows. A batch may come again, smaller."""
    first, places = 0, places_of(parquet.metadata, [column])
    for group in range(parquet.num_row_groups):
        metadata = parquet.metadata.row_group(group)
        stop = first + metadata.num_rows
        if _any_within(wanted, first, stop):
            held = held_bytes(metadata, places)
            rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * metadata.num_rows // max(held, 1)))
            read = functools.partial(parquet.iter_batches, row_groups=[group], columns=[column])
            yield from _up_to_damage(file, read, rows, range(first, stop), wanted)
        first = stop


def _up_to_damage(
    file: TableFile, read: Callable[..., Iterator[pa.RecordBatch]], rows: int, group: range, wanted: tuple[int, ...]
) -> Iterator[tuple[int, pa.Array]]:
    """Batches of `rows` of a row group, up to its last wanted row: damage behind that concerns nobody. One that cannot
    be decoded costs another pass, a row at a time: those before the damage are whole."""
    for size in (rows, 1):
        start = group.start
        try:
            for batch in read(batch_size=size):
                yield start, batch.column(0)
                start += batch.num_rows
                if not _any_within(wanted, start, group.stop):
                    return
            raise pa.ArrowInvalid("it ends early")
        except (pa.ArrowException, OSError) as error:
            if file.failed or isinstance(error, MemoryError):
                raise
            if size == 1 or not _any_within(wanted, start, start + size):
                raise _DamageError(start, group.stop, scrub(str(error))) from error


def _any_within(rows: tuple[int, ...], start: int, stop: int) -> bool:
    place = bisect.bisect_left(rows, start)
    return place < len(rows) and rows[place] < stop


def _value(scalar: pa.Scalar) -> Value:
    value = scalar.as_py()
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path")
    return value, None


def _image_column(schema: pa.Schema, name: str) -> str:
    """`name` where it holds images, else the only column that does: the rule by which the table was listed."""
    candidates = [field.name for field in schema if holds_images(field.type)]
    if name in candidates:
        return name
    if len(candidates) == 1:
        return str(candidates[0])
    raise ImageError("fetch", "NoImageColumn", f"the table has no column `{name}` with image bytes (any more)")
