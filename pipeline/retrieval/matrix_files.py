"""The files of a run's matrix: made once from the parts, then mapped by every command that reads vectors.

They lie under `DIR/index/_matrix/`, in a folder named by the run, its model and the parts it was made from, so it is
never stale; where the run is on an object store or on a read-only disk it lies in the user's cache folder instead.
Of each feature of a run only the newest is kept.
"""

import atexit
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem

from pipeline.retrieval.arrays import Progress, lengths
from pipeline.retrieval.matrix import CHUNK_BYTES
from pipeline.retrieval.output import ABANDONED_S
from pipeline.retrieval.parts import Part, fingerprint, stream_part
from pipeline.storage import cache_folder, is_local
from schemas.errors import OutputError
from schemas.run import RunRecord

_READ_ROWS = 8192


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
    address = fs.unstrip_protocol(root)
    return Path(cache_folder(), "matrix", hashlib.sha256(address.encode()).hexdigest()[:16])


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
            "that it can be written, or name another folder for them with PATCHSTREAM_CACHE, which is used where the "
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
