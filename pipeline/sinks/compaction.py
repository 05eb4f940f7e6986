"""Replace sets of parts by other parts with the same rows, so that a glob never sees a row twice.

A swap goes: write the new parts to `_swap/`, write the plan `_swap/plan.json`, delete the old parts, move the new
ones in, delete the plan. Once the plan is there the swap will be finished, by this process or by the next command
on the directory (`recover`); before that it never happened. In between a reader sees fewer rows, never more.

Jobs of several shards share a directory, and a part may hold rows of two of them: one swap goes on at a time, under the
lock `_swapping`, which is held from reading the old parts to the end. Who gets it finishes what its last holder left.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
from fsspec import AbstractFileSystem

from pipeline.addresses import join
from pipeline.encoding import encode
from pipeline.lock import Held, locked
from pipeline.sinks import intervals
from pipeline.sinks.intervals import Spans
from pipeline.sinks.parts import (
    FOLDERS,
    Part,
    is_there,
    list_parts,
    part_name,
    read_part,
    read_row_numbers,
)
from pipeline.storage import Options, exists, filesystem, is_local, put_bytes, read_json, redact, remove
from pipeline.store_errors import reading, write_error
from schemas.errors import OutputError, PatchstreamError
from schemas.tables import METADATA_KEY, SWAP_PLAN

_STAGING = "_swap"
_LOCK = "_swapping"
# A part this close to the target stays as it is: rewriting it would gain nothing.
_GOOD_FRACTION = 0.5
# At the end of a run, for which somebody waits: what was committed because it was full stays (64 of 256 MiB where
# nothing else is asked, on the disk less), and what the clock cut is merged.
FULL_FRACTION = 0.125
# Arrow joins the chunks of a column to take rows of it, and one array holds no more than 2 GiB of texts (26.0).
_TAKEN_ROWS = 1 << 12

log = logging.getLogger(__name__)


def compact(
    out: str,
    target_bytes: int,
    storage_options: Options,
    first: int = 0,
    stop: int | None = None,
    good_fraction: float = _GOOD_FRACTION,
) -> int:
    """Bring parts within rows [first, stop) to about `target_bytes`; returns how many parts went into larger ones.
    Those of at least `good_fraction` of it stay as they are.

    Rows inside a new part ascend. Rows that stand twice are kept once: the copy in the earlier part.
    """
    fs, path = filesystem(out, storage_options)
    recover(out, storage_options)
    merged = 0
    for folder in FOLDERS:
        mine = [part for part in list_parts(fs, path) if part.folder == folder]
        mine = [part for part in mine if part.first >= first and (stop is None or part.last < stop)]
        for group in _groups(mine, target_bytes, good_fraction):
            with _swapping(fs, path) as held:
                # What somebody else has rewritten meanwhile is left to the next time.
                if all(is_there(fs, join(path, part.path)) for part in group):
                    _swap(fs, path, held, group, _merge(fs, path, group))
                    merged += len(group)
    return merged


def remove_rows(out: str, folder: str, rows: Spans, storage_options: Options) -> int:
    """Rewrite the parts of `folder` without `rows`; returns how many rows went."""
    fs, path = filesystem(out, storage_options)
    removed = 0
    with _swapping(fs, path) as held:
        for part in list_parts(fs, path):
            if part.folder != folder or not len(intervals.intersect(rows, part.first, part.last + 1)):
                continue
            inside = intervals.contains(rows, read_row_numbers(fs, path, part))
            if inside.any():
                table = read_part(fs, path, part, out=path)
                _swap(fs, path, held, [part], table.filter(pa.array(~inside)))
                removed += int(inside.sum())
    return removed


def drop_repeats(out: str, twice: Spans, storage_options: Options) -> int:
    """Leave one copy of each row in `twice`. Between parts an orphaned worker's write can have made the others; within
    a part, a version that wrote what a repeated task gave again.

    An image outweighs a failure; between parts of a kind the first by name stays. Returns how many copies went.
    """
    fs, path = filesystem(out, storage_options)
    kept = intervals.EMPTY
    removed = 0
    written: set[str] = set()
    with _swapping(fs, path) as held:
        for part in sorted(list_parts(fs, path), key=lambda part: (FOLDERS.index(part.folder), part.name)):
            if part.path in written:
                continue  # what was left of an earlier part has this one's rows, and with them its name
            rows = read_row_numbers(fs, path, part)
            mine = intervals.contains(twice, rows)
            later = np.ones(len(rows), bool)
            later[np.unique(rows, return_index=True)[1]] = False
            again = intervals.contains(kept, rows) | (mine & later)
            kept = intervals.union([kept, intervals.from_rows(rows[mine])])
            if again.any():
                table = read_part(fs, path, part, out=path)
                written.update(_swap(fs, path, held, [part], table.filter(pa.array(~again))))
                removed += int(again.sum())
    return removed


def recover(out: str, storage_options: Options) -> None:
    """Finish a swap that was cut short, or clear away one that never began."""
    fs, path = filesystem(out, storage_options)
    if is_there(fs, join(path, _STAGING)):
        with _swapping(fs, path):
            pass  # who gets the lock finishes what is there


@contextmanager
def _swapping(fs: AbstractFileSystem, out: str) -> Iterator[Held]:
    """The lock, with nothing left of a swap whose holder died while we waited: the old parts may be gone already."""
    with locked(fs, join(out, _LOCK), "rewriting parts") as held:
        assert held is not None
        with reading(join(out, SWAP_PLAN)) as place:
            plan = read_json(fs, place)
        if plan is None:
            _clear(fs, out)
        else:
            _carry_out(fs, out, held, plan)
        yield held


def _groups(parts: list[Part], target_bytes: int, good_fraction: float) -> Iterator[list[Part]]:
    """Neighbours in row order that together come to about `target_bytes`, where there are at least two."""
    group: list[Part] = []
    size = 0
    for part in sorted(parts, key=lambda part: part.first):
        if part.size >= target_bytes * good_fraction:
            continue
        if group and size + part.size > target_bytes:
            if len(group) > 1:
                yield group
            group, size = [], 0
        group.append(part)
        size += part.size
    if len(group) > 1:
        yield group


def _merge(fs: AbstractFileSystem, out: str, group: list[Part]) -> pa.Table:
    # Held against their checksums: what is damaged must not get new ones.
    tables = [read_part(fs, out, part, out=out) for part in sorted(group, key=lambda part: part.name)]
    metadata = tables[0].schema.metadata
    tables = [table.replace_schema_metadata(None) for table in tables]
    numbers = [table["row"].to_numpy() for table in tables]
    if not all((ascending[1:] >= ascending[:-1]).all() for ascending in numbers):
        names = ", ".join(part.name for part in group[:3])
        raise OutputError(f"{redact(out)}: the rows of a part do not ascend, so it cannot be merged; one of {names}, …")
    rows = np.unique(np.concatenate(numbers))
    pieces = []
    for begin in range(0, len(rows), _TAKEN_ROWS):
        first, last = rows[begin : begin + _TAKEN_ROWS][[0, -1]]
        bounds = [np.searchsorted(ascending, [first, last + 1]) for ascending in numbers]
        parts = [table.slice(a, b - a) for table, (a, b) in zip(tables, bounds, strict=True) if b > a]
        piece = pa.concat_tables(parts)
        _, keep = np.unique(piece["row"].to_numpy(), return_index=True)
        pieces.append(piece.take(pa.array(keep)))
    return pa.concat_tables(pieces).replace_schema_metadata(metadata)


def _swap(fs: AbstractFileSystem, out: str, held: Held, old: list[Part], new: pa.Table) -> list[str]:
    """Put the rows of `new` in the place of `old`; returns the path below `out` of the part that holds them, if any."""
    names = [f"{old[0].folder}/{part_name(new['row'].to_numpy())}"] if new.num_rows else []
    for name in names:
        put_bytes(fs, join(out, _STAGING, name), encode(new, new.schema.metadata[METADATA_KEY]))
    plan = {"remove": [part.path for part in old if part.path not in names], "add": names}
    held.check()
    put_bytes(fs, join(out, SWAP_PLAN), json.dumps(plan).encode())
    _carry_out(fs, out, held, plan)
    return names


def _carry_out(fs: AbstractFileSystem, out: str, held: Held, plan: dict[str, list[str]]) -> None:
    held.check()  # writing the plan may have taken so long that another job holds the lock
    try:
        staged = [name for name in plan["add"] if exists(fs, join(out, _STAGING, name))]
        if any(name not in staged and not exists(fs, join(out, name)) for name in plan["add"]):
            # A plan that arrived after its holder had lost the lock, and its parts with it. The old parts are all there
            # is: the rows of any that are gone will be found missing by the next run.
            log.warning("a plan to rewrite parts in %s came too late; the parts stay as they are", redact(out))
        else:
            _replace(fs, out, plan["remove"], staged)
        held.check()  # else the plan that is there now is another's
        remove(fs, join(out, SWAP_PLAN))
        _clear(fs, out)
    except PatchstreamError:
        raise
    except Exception as error:  # each driver has errors of its own, not all of them an OSError
        raise write_error(out, error) from error


def _replace(fs: AbstractFileSystem, out: str, old: list[str], staged: list[str]) -> None:
    for name in old:
        if exists(fs, join(out, name)):
            remove(fs, join(out, name))
    for name in staged:
        _move(fs, join(out, _STAGING, name), join(out, name))


def _move(fs: AbstractFileSystem, source: str, target: str) -> None:
    if is_local(fs):
        fs.mv(source, target)
    else:
        fs.cp_file(source, target)
        remove(fs, source)


def _clear(fs: AbstractFileSystem, out: str) -> None:
    staging = join(out, _STAGING)
    try:
        if exists(fs, staging):
            remove(fs, staging, recursive=True)
    except Exception as error:  # each driver has errors of its own, not all of them an OSError
        raise write_error(staging, error) from error
