"""Fetch single rows of a table in parts, by row number, reading only the row groups that hold them."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.report.run import PartGone, RunDirectory, open_part

_EVERY = (-(2**63), 2**63 - 1)
_READERS = 16


@dataclass(frozen=True)
class Piece:
    """One row group of a part, and the range of row numbers that its statistics give."""

    path: str
    group: int
    low: int
    high: int
    compressed_bytes: dict[str, int]


def pieces(run: RunDirectory, folder: str) -> list[Piece]:
    """Every row group of `folder`, from the Parquet footers alone."""
    found = []
    for path in run.parts(folder):
        with open_part(run.fs, path) as part:
            found += [_piece(path, part.metadata.row_group(group), group) for group in range(part.num_row_groups)]
    return found


def _piece(path: str, metadata: pq.RowGroupMetaData, group: int) -> Piece:
    low, high = _EVERY
    sizes: dict[str, int] = {}
    for index in range(metadata.num_columns):
        column = metadata.column(index)
        name = column.path_in_schema.partition(".")[0]
        sizes[name] = sizes.get(name, 0) + column.total_compressed_size
        # A column of the user's may be called `row.id`.
        if column.path_in_schema == "row" and column.statistics is not None and column.statistics.has_min_max:
            low, high = column.statistics.min, column.statistics.max
    return Piece(path, group, low, high, sizes)


class RowLookup:
    """Rows of one table, whole or some columns, by number. Safe to use from several threads.

    The last `cached_groups` row groups read stay in memory, since pages and neighbours ask for the same ones.
    """

    def __init__(self, run: RunDirectory, folder: str, columns: Sequence[str], cached_groups: int = 4) -> None:
        self._run = run
        self._folder = folder
        self._columns = list(columns)
        self._pieces = pieces(run, folder)
        self._cached_groups = cached_groups
        self._cache: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, rows: Iterable[int]) -> dict[int, dict[str, Any]]:
        """The records of those `rows` that exist, by row.

        Where a compaction took parts away, from those that replaced them. Raises OutputError if that is another run.
        """
        wanted = np.unique(np.fromiter(rows, np.int64))
        try:
            return self._find(wanted)
        except PartGone:
            self._run.check_same()
            self._pieces = pieces(self._run, self._folder)
            return self._find(wanted)

    def _find(self, wanted: NDArray[np.int64]) -> dict[int, dict[str, Any]]:
        value_set = pa.array(wanted)
        holding = [piece for piece in self._pieces if np.any((wanted >= piece.low) & (wanted <= piece.high))]

        def read(piece: Piece) -> list[dict[str, Any]]:
            table = self._read(piece)
            records: list[dict[str, Any]] = table.filter(pc.is_in(table.column("row"), value_set)).to_pylist()
            return records

        if len(holding) < 2:
            return {record["row"]: record for piece in holding for record in read(piece)}
        # On an object store each is a few requests, one after the other.
        with ThreadPoolExecutor(min(_READERS, len(holding))) as pool:
            return {record["row"]: record for records in pool.map(read, holding) for record in records}

    def _read(self, piece: Piece) -> pa.Table:
        key = (piece.path, piece.group)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        with open_part(self._run.fs, piece.path) as part:
            present = [name for name in self._columns if name in part.schema_arrow.names]
            table = part.read_row_group(piece.group, columns=present)
        with self._lock:
            self._cache[key] = table
            while len(self._cache) > self._cached_groups:
                self._cache.popitem(last=False)
        return table
