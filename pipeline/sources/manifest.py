"""The manifest: one row per image, frozen when a run starts, read back in slices by the workers."""

import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from pipeline.addresses import join
from pipeline.settled import listing
from pipeline.sources.columns import ColumnMisfit, concatenated, conformed, unified
from pipeline.sources.expand import expand
from pipeline.storage import Options, filesystem, put_bytes, redact, remove
from pipeline.store_errors import manifest_error, reading
from schemas.errors import OutputError, SourceError
from schemas.spec import JobSpec
from schemas.tables import MANIFEST_FIELDS, METADATA_KEY, SCHEMA_VERSION, manifest_schema, user_fields

PART_ROWS = 1 << 20
# A part is put together in memory, so that columns of long texts make it shorter.
PART_BYTES = 192 << 20
# A worker reads whole row groups; this many rows is about a megabyte of addresses. Long texts make shorter ones.
GROUP_ROWS = 1 << 14
GROUP_BYTES = 16 << 20
_BATCH_ROWS = 131_072
# By it a listing of a folder that a run lies in knows a part for one of ours.
_METADATA = json.dumps({"schema_version": SCHEMA_VERSION}).encode()

# An earlier version had no last number, that of the freeze.
_PART_NAME = re.compile(r"manifest-\d+-\d+(-[0-9a-f]{8})?\.parquet")


class ManifestPart(NamedTuple):
    """A file of the manifest and the rows [first, stop) in it."""

    name: str
    first: int
    stop: int


def read_sources(spec: JobSpec) -> Iterator[pa.Table]:
    """Manifest rows (without `row`) of all sources, cut off at `spec.limit`.

    Raises SourceError when nothing matches.
    """
    left = spec.limit
    found = empty = 0
    for source in spec.sources:
        for table in expand(source, spec):
            empty += not table.num_rows
            if left is not None:
                table = table.slice(0, left)
                left -= table.num_rows
            found += table.num_rows
            if table.num_rows:
                yield table
            if left == 0:
                return
    if not found:
        names = ", ".join(redact(source) for source in spec.sources)
        chosen = bool(spec.include or spec.exclude)
        raise SourceError(
            f"no image matches {names}"
            + (" with the given --include/--exclude" if chosen else "")
            + ("; the tables there have no rows" if empty and not chosen else "")
            + "; give a file, a folder, a glob, a prefix, a table with a `uri` column or .tar shards"
        )


def write_manifest(
    tables: Iterable[pa.Table],
    out: str,
    storage_options: Options,
    *,
    first_row: int = 0,
    schema: pa.Schema | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[ManifestPart]:
    """Number the rows from `first_row` and write them as `manifest/*.parquet` under `out`.

    All parts have the same columns: those of `schema` where one is given, else whatever the sources carry together.
    The parts count only once the run record names them; what a freeze that was cut short left behind is removed first.
    `check` is called before each file is removed or stored, and may raise. No two freezes give a part the same name:
    one that lost its lock while it stored a part does not replace that of another.
    Raises SourceError where the sources disagree on a column, OutputError where they carry one that `schema` lacks.
    """
    fs, path = filesystem(out, storage_options)
    _remove_leftovers(fs, path, first_row, check)
    freeze = uuid.uuid4().hex[:8]
    parts: list[ManifestPart] = []
    schemas: list[pa.Schema] = []
    for rows in _chunks(tables):
        table = _number(rows, parts[-1].stop if parts else first_row)
        if schema is not None:
            table = _fitted(table, schema, out)
        parts.append(_write(fs, path, table, freeze, check))
        schemas.append(table.schema)
    whole = schema or (_typed(unified(schemas)) if schemas else None)
    for part, written in zip(parts, schemas, strict=True):
        if not written.equals(whole):
            with fs.open(join(path, "manifest", part.name), "rb") as file:
                table = pq.read_table(file)
            _write(fs, path, conformed(table, whole), freeze, check)
    return parts


def require_parts(out: str, parts: list[ManifestPart], storage_options: Options) -> None:
    """Raise OutputError where one of `parts` is gone: another job, which held the lock meanwhile, has removed it."""
    fs, path = filesystem(out, storage_options)
    there: set[str] = set()
    with suppress(FileNotFoundError), reading(join(path, "manifest")) as folder:
        there = {str(place).rpartition("/")[2] for place in listing(fs, folder)}
    missing = [part.name for part in parts if part.name not in there]
    if missing:
        raise OutputError(
            f"{redact(out)}: manifest/{missing[0]}, which this job wrote, is gone: another job has listed the sources "
            "meanwhile, because the store did not answer this one for a while. Run the same command again"
        )


def _remove_leftovers(fs: AbstractFileSystem, path: str, first_row: int, check: Callable[[], None]) -> None:
    """Delete parts that no record names: all that begin at `first_row` or behind it. They are listed before `check`,
    so that there is none among them of a job that took over."""
    try:
        found = listing(fs, join(path, "manifest"))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in (str(place).rpartition("/")[2] for place in found):
        if _PART_NAME.fullmatch(name) and part_named(name).first >= first_row:
            check()
            remove(fs, join(path, "manifest", name))


def _fitted(table: pa.Table, schema: pa.Schema, out: str) -> pa.Table:
    unknown = [name for name in table.column_names if name not in schema.names]
    if unknown:
        raise OutputError(
            f"the sources now carry columns ({', '.join(unknown)}) that they did not when {redact(out)} was started; "
            "start a new --out"
        )
    try:
        return conformed(table, schema)
    except ColumnMisfit as error:
        name, kind = error.column, schema.field(error.column).type
        way_out = f"write `{name}` without zeros in front, as plain numbers, as this run holds it, or "
        raise OutputError(
            f"column `{name}` of the sources does not hold what it did, {kind}, when {redact(out)} was started "
            f"({error.__cause__}); {way_out if error.zeros else ''}start a new --out"
        ) from error


def _typed(schema: pa.Schema) -> pa.Schema:
    """Columns that are null throughout become text."""
    return pa.schema([field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in schema])


def part_named(name: str) -> ManifestPart:
    """The part behind a file name such as `manifest-000000000000-000001048576-5f0c3a1e.parquet`."""
    _, first, stop, *_ = name.removesuffix(".parquet").split("-")
    return ManifestPart(name, int(first), int(stop))


def read_schema(out: str, part: ManifestPart, storage_options: Options) -> pa.Schema:
    """Arrow schema of a manifest part, the user's columns included. Raises OutputError as all that read one do."""
    with _opened(out, part, storage_options) as parquet:
        return parquet.schema_arrow.remove_metadata()


def read_rows(out: str, parts: list[ManifestPart], spans: np.ndarray, storage_options: Options) -> Iterator[pa.Table]:
    """Manifest rows in `spans`, an (n, 2) int64 array of ascending [start, stop) ranges.

    Only the row groups that a span touches are read. Raises OutputError naming a part that cannot be read.
    """
    for part in parts:
        inside = spans[(spans[:, 0] < part.stop) & (spans[:, 1] > part.first)]
        if not len(inside):
            continue
        with _opened(out, part, storage_options) as parquet:
            first = part.first
            for group in range(parquet.num_row_groups):
                stop = first + parquet.metadata.row_group(group).num_rows
                touching = inside[(inside[:, 0] < stop) & (inside[:, 1] > first)]
                if len(touching):
                    yield _cut(parquet.read_row_group(group), first, touching)
                first = stop


def read_columns(
    out: str, parts: list[ManifestPart], columns: list[str], storage_options: Options
) -> Iterator[pa.RecordBatch]:
    """Columns of all rows of `parts`. Raises OutputError naming a part that cannot be read."""
    for part in parts:
        with _opened(out, part, storage_options) as parquet:
            yield from parquet.iter_batches(_BATCH_ROWS, columns=columns)


def check_parts(out: str, parts: list[ManifestPart], storage_options: Options) -> list[str]:
    """Read every part, a row group at a time, and hold it against its name; returns the problems."""
    problems = []
    for part in parts:
        try:
            with _opened(out, part, storage_options) as parquet:
                groups = (parquet.read_row_group(group)["row"].to_numpy() for group in range(parquet.num_row_groups))
                rows = np.concatenate([np.empty(0, np.int64), *groups])
        except OutputError as error:
            problems.append(str(error))
            continue
        if not np.array_equal(rows, np.arange(part.first, part.stop)):
            problems.append(f"manifest/{part.name}: the rows in it are not those that its name stands for")
    return problems


@contextmanager
def _opened(out: str, part: ManifestPart, storage_options: Options) -> Iterator[pq.ParquetFile]:
    """A part whose pages are held against their checksums; OutputError naming it if the block cannot read it."""
    fs, path = filesystem(out, storage_options)
    try:
        with (
            fs.open(join(path, "manifest", part.name), "rb") as file,
            pq.ParquetFile(file, page_checksum_verification=True) as parquet,
        ):
            yield parquet
    except Exception as error:  # each driver has errors of its own, not all of them an OSError
        raise manifest_error(join(out, "manifest", part.name), error) from error


def _cut(table: pa.Table, first: int, spans: np.ndarray) -> pa.Table:
    starts = np.maximum(spans[:, 0] - first, 0)
    stops = np.minimum(spans[:, 1] - first, table.num_rows)
    if len(spans) <= 16:
        return pa.concat_tables([table.slice(a, b - a) for a, b in zip(starts, stops, strict=True)])
    indices = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
    return table.take(pa.array(indices))


def _chunks(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Concatenate and cut by rows and by bytes."""
    held: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        size += table.nbytes
        if rows >= PART_ROWS or size >= PART_BYTES:
            joined = concatenated(held)
            yield joined.slice(0, PART_ROWS)
            rest = joined.slice(PART_ROWS)
            held, rows, size = ([rest] if len(rest) else []), len(rest), rest.nbytes
    if rows:
        yield concatenated(held)


def _number(table: pa.Table, first: int) -> pa.Table:
    numbers = pa.array(np.arange(first, first + table.num_rows, dtype=np.int64))
    numbered = table.add_column(0, MANIFEST_FIELDS[0], numbers)
    return numbered.cast(manifest_schema(user_fields(numbered.schema)))


def _write(fs: AbstractFileSystem, out: str, table: pa.Table, freeze: str, check: Callable[[], None]) -> ManifestPart:
    first = table["row"][0].as_py()
    stop = first + table.num_rows
    part = ManifestPart(f"manifest-{first:012d}-{stop:012d}-{freeze}.parquet", first, stop)
    sink = pa.BufferOutputStream()
    group_rows = max(1, min(GROUP_ROWS, GROUP_BYTES * table.num_rows // table.nbytes))
    marked = table.replace_schema_metadata({METADATA_KEY: _METADATA})
    pq.write_table(marked, sink, row_group_size=group_rows, compression="zstd", write_page_checksum=True)
    check()
    put_bytes(fs, join(out, "manifest", part.name), sink.getvalue().to_pybytes())
    return part
