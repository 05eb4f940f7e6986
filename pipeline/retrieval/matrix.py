"""All vectors of a run as one N×D matrix on disk, memory-mapped: made once from the parts, then read at memory speed.

It lies under `DIR/index/_matrix/`, in a folder named by the run, its model and the parts it was made from, so it is
never stale; where the run is on an object store or on a read-only disk it lies in the user's cache folder instead.
Of each feature of a run only the newest is kept.
"""

import atexit
import hashlib
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

from pipeline.retrieval.arrays import Floats, Ints, Mask, Progress, lengths
from pipeline.retrieval.output import ABANDONED_S
from pipeline.retrieval.parts import Part, fingerprint, stream_part
from pipeline.storage import is_local, join
from schemas.errors import OutputError
from schemas.run import RunRecord

CHUNK_BYTES = 64 * 1024 * 1024
_READ_ROWS = 8192


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
        mask: Mask = np.isfinite(self.norms) & (self.norms > 0)
        return mask

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


def prepare_matrix(
    fs: AbstractFileSystem,
    root: str,
    record: RunRecord,
    parts: list[Part],
    name: str,
    dim: int,
    dtype: Any,
    progress: Progress,
) -> Path:
    """The folder of the matrix of feature `name`, made from the parts if this set of parts was not seen before.

    Raises OutputError naming the folder, and the bytes it takes, if it cannot be kept there.
    """
    key = f"{name}-{fingerprint(parts, record, root, name, str(dtype))[:16]}"
    cache = _user_cache(fs, root)
    home = Path(root, "index", "_matrix") if is_local(fs) else cache
    for base in (home, cache):
        with suppress(PermissionError):  # made by somebody else and closed to us
            if (base / key / "norms.npy").exists():
                return base / key
    base = home if _writable(home) else cache
    _build(fs, parts, name, dim, dtype, base / key, progress)
    _remove_older(base, name, key)
    return base / key


def _user_cache(fs: AbstractFileSystem, root: str) -> Path:
    """The folder of this run's matrices in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or join(str(Path.home()), ".cache")
    address = fs.unstrip_protocol(root)
    return Path(home, "patchstream", "matrix", hashlib.sha256(address.encode()).hexdigest()[:16])


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _build(
    fs: AbstractFileSystem, parts: list[Part], name: str, dim: int, dtype: Any, folder: Path, progress: Progress
) -> None:
    total = sum(part.rows for part in parts)
    # Ids take 8 bytes a row and lengths 4.
    size = total * (dim * np.dtype(dtype).itemsize + 12)
    with _staged_folder(folder, size) as temporary:
        with _explained(folder, size):
            vectors = _reserved(temporary / "vectors.npy", (total, dim), dtype)
        rows, norms = np.empty(total, np.int64), np.empty(total, np.float32)

        def fill(start: int, part: Part) -> None:
            for ids, batch in stream_part(fs, part, name, dim, _READ_ROWS):
                stop = start + len(ids)
                vectors[start:stop], rows[start:stop], norms[start:stop] = batch, ids, lengths(batch)
                start = stop

        starts = np.cumsum([0, *(part.rows for part in parts)]).tolist()
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            futures = [pool.submit(fill, start, part) for start, part in zip(starts, parts, strict=False)]
            for future, done in zip(futures, starts[1:], strict=True):
                future.result()
                progress(f"reading {name}", done, total)
        finally:
            # Whoever interrupts this waits neither for parts that are still to come nor for those under way.
            pool.shutdown(wait=False, cancel_futures=True)
        with _explained(folder, size):
            vectors.flush()
            np.save(temporary / "rows.npy", rows)
            np.save(temporary / "norms.npy", norms)


@contextmanager
def _staged_folder(folder: Path, size: int) -> Iterator[Path]:
    """A folder to fill; it becomes `folder` when the block ends well, and vanishes when it does not."""
    with _explained(folder, size):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    remove = partial(shutil.rmtree, temporary, ignore_errors=True)
    atexit.register(remove)  # a process may end while a thread of its is still at it
    try:
        yield temporary
        with _explained(folder, size):
            try:
                temporary.chmod(0o777 & ~_umask())  # a temporary folder is for its maker alone
                temporary.rename(folder)
            except OSError:
                # Another command made the same matrix in the meantime; its content is the same.
                if not (folder / "norms.npy").exists():
                    raise
    finally:
        remove()
        atexit.unregister(remove)


def _umask() -> int:
    """That of this process, which can only be read by setting it."""
    current = os.umask(0o077)
    os.umask(current)
    return current


def _reserved(path: Path, shape: tuple[int, int], dtype: Any) -> np.memmap[Any, Any]:
    """A new array on disk, mapped. Raises OSError where there is no room for it."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    # The file is sparse as it is made: a write through the map that finds the disk full ends the process.
    with open(path, "r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        else:  # macOS: zeros that are written take their room as well
            file.seek(array.offset)
            for start in range(0, array.nbytes, CHUNK_BYTES):
                file.write(bytes(min(CHUNK_BYTES, array.nbytes - start)))
    return array


@contextmanager
def _explained(folder: Path, size: int) -> Iterator[None]:
    """OSError in the block becomes OutputError: what could not be kept where, how large it is, what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot keep the vectors in {folder}, {size:,} bytes: {error.strerror or error}. Make room there and see "
            "that it can be written, or name another folder for them with XDG_CACHE_HOME, which is used where the "
            "run is on an object store or cannot be written to"
        ) from error


def _remove_older(base: Path, name: str, key: str) -> None:
    for folder in base.glob(f"{name}-*"):
        if folder.name != key:
            shutil.rmtree(folder, ignore_errors=True)
    # What a command that was killed left behind. One at work writes; no lock, for it may be on another machine.
    for folder in base.glob(f".{name}-*"):
        if time.time() - _last_write(folder) > ABANDONED_S:
            shutil.rmtree(folder, ignore_errors=True)


def _last_write(folder: Path) -> float:
    """Seconds since 1970; now where the folder has just been renamed or removed."""
    try:
        return max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
    except OSError:
        return time.time()


def map_matrix(folder: Path, name: str, replaced: Ints) -> Matrix:
    """The matrix that `prepare_matrix` left in `folder`."""
    # Linux charges a copy-on-write map to memory and swap, and refuses one that is larger than both together.
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    return Matrix(name, np.load(folder / "rows.npy"), vectors, np.load(folder / "norms.npy"), replaced)
