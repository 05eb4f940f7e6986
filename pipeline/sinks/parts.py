"""Parts: the Parquet files under `images/` and `failures/`.

A part is named by the rows in it, so that a write that is tried again lands on the same name:
`part-<first>-<last>-<count>-<digest of the row numbers>.parquet`. A part whose count fills its range is dense, and
its rows are known without opening it.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from pipeline.addresses import join
from pipeline.columns import is_damage, open_columns
from pipeline.encoding import encode
from pipeline.settled import list_parquet
from pipeline.storage import exists, is_local, put_bytes, redact
from pipeline.store_errors import read_error, reading
from schemas.errors import OutputError
from schemas.tables import FAILURES_SCHEMA

FOLDERS = ("images", "failures")

_NAME = re.compile(r"part-(\d{12,})-(\d{12,})-(\d+)-[0-9a-f]{12}\.parquet")
# What `put_bytes` writes on a disk before it renames it.
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.[0-9a-f]{{8}}\.tmp")
_ABANDONED_S = 3600.0


class DamagedPart(OutputError):
    """A part holds something else than what was written."""


class Part(NamedTuple):
    """A visible part: `folder` is `images` or `failures`; rows `first` to `last`, `rows` of them."""

    folder: str
    name: str
    first: int
    last: int
    rows: int
    size: int = 0

    @property
    def path(self) -> str:
        """Relative to the run's directory."""
        return f"{self.folder}/{self.name}"

    @property
    def dense(self) -> bool:
        """Whether every row of its range is in it."""
        return self.rows == self.last - self.first + 1


def part_name(rows: npt.NDArray[np.int64]) -> str:
    """The name of the part that holds exactly `rows` (ascending)."""
    digest = hashlib.sha256(np.ascontiguousarray(rows, np.int64).tobytes()).hexdigest()[:12]
    return f"part-{rows[0]:012d}-{rows[-1]:012d}-{len(rows)}-{digest}.parquet"


def is_there(fs: AbstractFileSystem, place: str) -> bool:
    """Whether there is anything at `place`. Raises OutputError where the store does not let us look."""
    with reading(place):
        return exists(fs, place)


def list_parts(fs: AbstractFileSystem, out: str) -> list[Part]:
    """Every visible part, by folder and first row. Files that are no parts of ours are left alone.

    Raises OutputError where the store does not let us look.
    """
    parts = []
    for folder in FOLDERS:
        for path, size in list_parquet(fs, join(out, folder)):
            name = path.rpartition("/")[2]
            match = _NAME.fullmatch(name)
            if match:
                first, last, count = (int(text) for text in match.groups())
                parts.append(Part(folder, name, first, last, count, size))
    return sorted(parts)


def split(predicted: pa.Table, images_schema: pa.Schema) -> tuple[pa.Table, pa.Table]:
    """Predicted rows as an `images` table and a `failures` table, each by ascending row, each row once.

    A task that Ray repeats may cut its blocks elsewhere, and so give rows again: an image outweighs a failure.
    Addresses lose their signatures here: what stands in the output is made to be shared.
    """
    rows = predicted["row"].to_numpy()
    order = np.lexsort((pc.is_valid(predicted["error"]).to_numpy(), rows))
    _, first = np.unique(rows[order], return_index=True)
    ordered = predicted.take(pa.array(order[first]))
    uris = pa.array([redact(uri) for uri in ordered["uri"].to_pylist()], pa.string())
    ordered = ordered.set_column(ordered.column_names.index("uri"), images_schema.field("uri"), uris)
    failed = pc.is_valid(ordered["error"])
    images = ordered.filter(pc.invert(failed)).select(images_schema.names).cast(images_schema)
    return images, ordered.filter(failed).select(FAILURES_SCHEMA.names).cast(FAILURES_SCHEMA)


def write_part(
    fs: AbstractFileSystem,
    out: str,
    folder: str,
    table: pa.Table,
    metadata: bytes,
    check: Callable[[], None] = lambda: None,
) -> Part | None:
    """Write `table` (ascending rows) as one part of `folder`; None for an empty table.

    `metadata` is the run record as JSON. `check` is called between encoding and storing, and may raise. Raises
    OutputError naming the path.
    """
    if not table.num_rows:
        return None
    data = encode(table, metadata)
    rows = table["row"].to_numpy()
    name = part_name(rows)
    check()
    put_bytes(fs, join(out, folder, name), data)
    return Part(folder, name, int(rows[0]), int(rows[-1]), len(rows), len(data))


def remove_abandoned(fs: AbstractFileSystem, out: str) -> None:
    """Remove the hidden halves of parts that writers who were killed left on a disk; a store keeps none to see.

    What was written to within the hour may be another shard's at work.
    """
    if not is_local(fs):
        return
    for folder in FOLDERS:
        with suppress(OSError):  # no such folder, another was faster, or not ours to remove: nothing that a run needs
            for entry in os.scandir(join(out, folder)):
                if _UNFINISHED.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > _ABANDONED_S:
                    os.unlink(entry.path)


def read_row_numbers(fs: AbstractFileSystem, out: str, part: Part) -> npt.NDArray[np.int64]:
    """The `row` column of a part, shape (part.rows,). Raises as `read_columns` does, unless the part is dense."""
    if part.dense:
        return np.arange(part.first, part.last + 1, dtype=np.int64)
    rows: npt.NDArray[np.int64] = read_columns(fs, out, part, ["row"])["row"].to_numpy()
    return rows


def read_columns(fs: AbstractFileSystem, out: str, part: Part, columns: list[str] | None = None) -> pa.Table:
    """Some columns of a part, or all; pages are held against their checksums.

    Raises DamagedPart or, where the store does not let us read it, OutputError, both naming the part;
    FileNotFoundError if it has gone since it was listed.
    """
    place = join(out, part.path)
    try:
        with open_columns(fs, place) if columns else fs.open(place, "rb") as file:
            return pq.read_table(file, columns=columns, page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # each driver has errors of its own, not all of them an OSError
        if not is_damage(error):
            raise read_error(place, error) from error
        raise DamagedPart(
            f"{redact(place)} cannot be read ({redact(str(error))}). If it is damaged, delete it: the "
            "command that filled the directory, given again, then makes its rows anew"
        ) from error


def read_part(fs: AbstractFileSystem, path: str, part: Part, columns: list[str] | None = None, *, out: str) -> pa.Table:
    """As `read_columns`, with an OutputError also for a part that has gone. `path` is that of `out` on `fs`."""
    try:
        return read_columns(fs, path, part, columns)
    except FileNotFoundError as error:
        raise gone(out, error) from error


def gone(out: str, error: FileNotFoundError) -> OutputError:
    """For a part that another command replaces or removes while this one wants to read it."""
    return OutputError(
        f"{redact(out)}: a part has gone since it was listed ({redact(str(error))}); another command is writing there. "
        "Run this one again once that has ended"
    )
