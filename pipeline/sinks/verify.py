"""Re-read everything: does the directory hold what it says, all of it, once?"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from fsspec import AbstractFileSystem

from pipeline.sinks import intervals
from pipeline.sinks.intervals import Spans
from pipeline.sinks.ledger import pending, settled_ledger
from pipeline.sinks.parts import DamagedPart, Part, part_name, read_columns
from pipeline.storage import Options, filesystem, redact
from schemas.run import RunRecord
from schemas.tables import FAILURES_SCHEMA, METADATA_KEY


class Verification(NamedTuple):
    """Counts (`replaced`: rows of the manifest that newer versions replace), and every problem in words; no problem
    means every row of the manifest is in exactly one place."""

    manifest_rows: int
    replaced: int
    images: int
    failures: int
    pending: int
    parts: int
    problems: list[str]


def verify(
    out: str, run: RunRecord, replaced: Spans, images_schema: pa.Schema, storage_options: Options
) -> Verification:
    """Read every part of `out` with page checksums and hold it against its name, the schema and the manifest.

    Raises OutputError where the store does not let a part be read, of which nothing is known then, and where parts are
    being rewritten and that lasts.
    """
    fs, path = filesystem(out, storage_options)
    ledger = settled_ledger(out, storage_options, damaged_too=True)
    problems: list[str] = []
    for part in ledger.parts:
        schema = images_schema if part.folder == "images" else FAILURES_SCHEMA
        problems += [f"{part.path}: {problem}" for problem in _check_part(fs, path, part, schema, run)]
    if len(ledger.twice):
        problems.append(f"{intervals.count(ledger.twice)} rows stand in more than one part: {_show(ledger.twice)}")
    beyond = intervals.intersect(ledger.done, run.manifest_rows, np.iinfo(np.int64).max)
    if len(beyond):
        problems.append(f"{intervals.count(beyond)} rows are not in the manifest: {_show(beyond)}")
    stale = intervals.common(ledger.done, replaced)
    if len(stale):
        problems.append(
            f"{intervals.count(stale)} rows that newer ones replace still stand in parts: {_show(stale)}; run the same "
            "command again, which removes them"
        )
    left = pending(ledger, 0, run.manifest_rows, replaced)
    if len(left):
        problems.append(f"{intervals.count(left)} rows of the manifest are in neither place: {_show(left)}")
    return Verification(
        run.manifest_rows,
        intervals.count(replaced),
        intervals.count(ledger.images),
        intervals.count(ledger.failures),
        intervals.count(left),
        len(ledger.parts),
        problems,
    )


def _check_part(fs: AbstractFileSystem, out: str, part: Part, schema: pa.Schema, run: RunRecord) -> Iterator[str]:
    try:
        table = read_columns(fs, out, part)
    except FileNotFoundError:
        yield "has gone since it was listed; another command is writing there. Verify again once that has ended"
        return
    except DamagedPart as error:
        yield f"cannot be read ({redact(str(error.__cause__))}); delete the file and run the same command again"
        return
    if not table.schema.equals(schema):
        yield f"schema differs: {_schema_difference(table.schema, schema)}"
    rows = table["row"].to_numpy()
    if len(rows) and (np.any(np.diff(rows) <= 0) or part_name(rows) != part.name):
        yield "the rows in it are not those that its name stands for; delete the file and run the same command again"
    if not run.describes((table.schema.metadata or {}).get(METADATA_KEY)):
        yield "its metadata is not that of this run"


def _schema_difference(found: pa.Schema, wanted: pa.Schema) -> str:
    mine = {field.name: str(field.type) for field in found}
    theirs = {field.name: str(field.type) for field in wanted}
    names = [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)]
    return ", ".join(f"{name} is {mine.get(name, 'missing')}, not {theirs.get(name, 'known')}" for name in names)


def _show(spans: Spans, most: int = 5) -> str:
    shown = [str(start) if stop == start + 1 else f"{start}–{stop - 1}" for start, stop in spans[:most].tolist()]
    return ", ".join(shown) + (", …" if len(spans) > most else "")
