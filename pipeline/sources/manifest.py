"""The manifest: one row per image, frozen when a run starts, read back in slices by the workers."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from pipeline.sources.expand import expand
from pipeline.storage import Options, filesystem, join, put_bytes, redact
from schemas.errors import SourceError
from schemas.spec import JobSpec
from schemas.tables import MANIFEST_FIELDS, manifest_schema, user_fields

PART_ROWS = 1 << 20
# A worker reads whole row groups; this many rows is about a megabyte of addresses.
GROUP_ROWS = 1 << 14


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
    found = 0
    for source in spec.sources:
        for table in expand(source, spec):
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
        raise SourceError(
            f"no image matches {names}"
            + (" with the given --include/--exclude" if spec.include or spec.exclude else "")
            + "; give a file, a folder, a glob, a prefix, a table with a `uri` column or .tar shards"
        )


def write_manifest(
    tables: Iterable[pa.Table], out: str, storage_options: Options, *, first_row: int = 0
) -> list[ManifestPart]:
    """Number the rows from `first_row` and write them as `manifest/*.parquet` under `out`.

    The parts count only once the run record names them, so a freeze that was cut short is simply written again.
    """
    fs, path = filesystem(out, storage_options)
    parts: list[ManifestPart] = []
    schemas: list[pa.Schema] = []
    for rows in _chunks(tables, PART_ROWS):
        table = _number(rows, parts[-1].stop if parts else first_row)
        part = _write(fs, path, table)
        parts.append(part)
        schemas.append(table.schema)
    if schemas and any(schema != schemas[0] for schema in schemas):
        _rewrite(fs, path, parts, pa.unify_schemas(schemas, promote_options="permissive"))
    return parts


def part_named(name: str) -> ManifestPart:
    """The part behind a file name such as `manifest-000000000000-000001048576.parquet`."""
    _, first, stop = name.removesuffix(".parquet").split("-")
    return ManifestPart(name, int(first), int(stop))


def read_schema(out: str, part: ManifestPart, storage_options: Options) -> pa.Schema:
    """Arrow schema of a manifest part, the user's columns included."""
    fs, path = filesystem(out, storage_options)
    with fs.open(join(path, "manifest", part.name), "rb") as file:
        return pq.read_schema(file).remove_metadata()


def read_rows(out: str, parts: list[ManifestPart], spans: np.ndarray, storage_options: Options) -> Iterator[pa.Table]:
    """Manifest rows in `spans`, an (n, 2) int64 array of ascending [start, stop) ranges.

    Only the row groups that a span touches are read.
    """
    fs, path = filesystem(out, storage_options)
    for part in parts:
        inside = spans[(spans[:, 0] < part.stop) & (spans[:, 1] > part.first)]
        if not len(inside):
            continue
        with fs.open(join(path, "manifest", part.name), "rb") as file, pq.ParquetFile(file) as parquet:
            first = part.first
            for group in range(parquet.num_row_groups):
                stop = first + parquet.metadata.row_group(group).num_rows
                touching = inside[(inside[:, 0] < stop) & (inside[:, 1] > first)]
                if len(touching):
                    yield _cut(parquet.read_row_group(group), first, touching)
                first = stop


def _cut(table: pa.Table, first: int, spans: np.ndarray) -> pa.Table:
    starts = np.maximum(spans[:, 0] - first, 0)
    stops = np.minimum(spans[:, 1] - first, table.num_rows)
    if len(spans) <= 16:
        return pa.concat_tables([table.slice(a, b - a) for a, b in zip(starts, stops, strict=True)])
    indices = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
    return table.take(pa.array(indices))


def _chunks(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Concatenate and cut so that each chunk but the last has exactly `rows` rows."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table)
        count += table.num_rows
        while count >= rows:
            joined = pa.concat_tables(held, promote_options="permissive")
            yield joined.slice(0, rows)
            held, count = [joined.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(held, promote_options="permissive")


def _number(table: pa.Table, first: int) -> pa.Table:
    numbers = pa.array(np.arange(first, first + table.num_rows, dtype=np.int64))
    numbered = table.add_column(0, MANIFEST_FIELDS[0], numbers)
    return numbered.cast(manifest_schema(user_fields(numbered.schema)))


def _write(fs: AbstractFileSystem, out: str, table: pa.Table) -> ManifestPart:
    first = table["row"][0].as_py()
    part = ManifestPart(f"manifest-{first:012d}-{first + table.num_rows:012d}.parquet", first, first + table.num_rows)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=GROUP_ROWS, compression="zstd", write_page_checksum=True)
    put_bytes(fs, join(out, "manifest", part.name), sink.getvalue().to_pybytes())
    return part


def _rewrite(fs: AbstractFileSystem, out: str, parts: list[ManifestPart], schema: pa.Schema) -> None:
    """Give every part the same columns: sources may differ in what rides along."""
    for part in parts:
        with fs.open(join(out, "manifest", part.name), "rb") as file:
            table = pq.read_table(file)
        columns = [
            table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
            for field in schema
        ]
        _write(fs, out, pa.table(columns, schema=schema))
