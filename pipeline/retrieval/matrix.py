"""All vectors of a run as one N×D matrix on disk, memory-mapped: read at memory speed, however large."""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.retrieval.arrays import Floats, Ints, Mask, directed

CHUNK_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Matrix:
    """`vectors` (N, D) float32 or float16, mapped read-only; `rows` (N,) their ids; `norms` (N,) their lengths.

    The order is that of the parts by name, so `vectors[i]` belongs to `rows[i]`. `replaced` are ids of older
    versions of objects that stand here in a newer version too.
    """

    name: str
    rows: Ints
    vectors: NDArray[Any]
    norms: Floats
    replaced: Ints

    @property
    def dim(self) -> int:
        """D."""
        return int(self.vectors.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def directed(self) -> Mask:
        """(N,) whether the vector has a direction: false for zeros, NaN and infinities."""
        return directed(self.norms)

    @cached_property
    def usable(self) -> Mask:
        """(N,) whether the row takes part: its vector has a direction and no newer version replaces it."""
        if not len(self.replaced):
            return self.directed
        return self.directed & ~np.isin(self.rows, self.replaced)

    @cached_property
    def left_out(self) -> Ints:
        """Ids of the rows whose vector no command can use, ascending."""
        return np.sort(self.rows[~self.directed])

    @property
    def chunk_rows(self) -> int:
        """Rows in a chunk of about 64 MiB of float32."""
        return self.chunk_rows_for(0)

    def chunk_rows_for(self, width: int) -> int:
        """Rows in a chunk where each becomes `width` numbers: neither they nor the vectors exceed about 64 MiB."""
        return max(1, CHUNK_BYTES // (4 * max(self.dim, width)))

    def take(self, positions: Ints) -> Floats:
        """Copies of some vectors, (n, D) float32. Positions count from 0 in the order of `rows`."""
        return self.vectors[positions].astype(np.float32, copy=False)

    def chunks(
        self, positions: Ints | None = None, chunk_rows: int | None = None, *, release: bool = False
    ) -> Iterator[tuple[Ints, Floats]]:
        """Positions (n,) and vectors (n, D) float32 of the usable rows, or of ascending `positions`, in order.

        With `release` the mapped pages of a chunk are given back once it is dealt with, so that a pass over the
        matrix does not count as memory in use; a vector is then a copy. Otherwise chunks are views where they can be.
        """
        wanted = np.flatnonzero(self.usable) if positions is None else positions
        step = chunk_rows or self.chunk_rows
        for start in range(0, len(self), step):
            stop = min(start + step, len(self))
            inside = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, stop)]
            if not len(inside):
                continue
            if len(inside) < stop - start:
                yield inside, self.take(inside)
            else:
                block = self.vectors[start:stop]
                yield inside, np.array(block, np.float32) if release else block.astype(np.float32, copy=False)
            if release:
                self.release(start, stop)

    def release(self, start: int, stop: int) -> None:
        """Give the memory pages of these positions back to the system; they are read again when needed."""
        mapped = getattr(self.vectors, "_mmap", None)
        if mapped is None:
            return
        row_bytes = self.vectors.strides[0]
        header = int(self.vectors.offset) % mmap.ALLOCATIONGRANULARITY if hasattr(self.vectors, "offset") else 0
        first = -(-(header + start * row_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (header + stop * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            mapped.madvise(mmap.MADV_DONTNEED, first, last - first)

    def mean(self) -> Floats:
        """(D,) mean of the usable vectors, accumulated in float64."""
        total = np.zeros(self.dim)
        for _, vectors in self.chunks(release=True):
            total += vectors.sum(axis=0, dtype=np.float64)
        mean: Floats = (total / max(1, int(self.usable.sum()))).astype(np.float32)
        return mean

    def positions_of(self, rows: Ints) -> Ints:
        """Position of each id, or -1 where it is not in the matrix."""
        order = self._order
        slots = np.searchsorted(self.rows, rows, sorter=order)
        found = order[np.minimum(slots, len(order) - 1)]
        positions: Ints = np.where(self.rows[found] == rows, found, -1)
        return positions

    @cached_property
    def _order(self) -> Ints:
        return np.argsort(self.rows, kind="stable")


def map_matrix(folder: Path, name: str, replaced: Ints) -> Matrix:
    """The matrix that `matrix_files.prepare_matrix` left in `folder`."""
    # Linux charges a copy-on-write map to memory and swap, and refuses one that is larger than both together.
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    return Matrix(name, np.load(folder / "rows.npy"), vectors, np.load(folder / "norms.npy"), replaced)
