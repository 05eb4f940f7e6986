"""`--update`: of what the sources list now, the rows that are new or changed since the manifest was frozen."""

from collections.abc import Iterable, Iterator

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.sources.manifest import ManifestPart
from pipeline.storage import Options, filesystem, join

_BATCH_ROWS = 65_536


def new_and_changed(
    tables: Iterable[pa.Table], out: str, parts: list[ManifestPart], storage_options: Options
) -> Iterator[pa.Table]:
    """Rows of `tables` whose address is unknown, or known with another etag or size.

    A changed row carries the row it replaces in `replaces`. An object without etag and size (a plain URL) counts
    as unchanged. The comparison runs in DuckDB, which spills to disk when the manifest outgrows memory.
    """
    with duckdb.connect() as database:
        _load_known(database, out, parts, storage_options)
        for table in tables:
            database.register("listed", table.append_column("place", pa.array(np.arange(len(table)))))
            found = database.sql(
                """
                select place, known.row as old, known.uri is not null as is_known,
                       (listed.etag is distinct from known.etag and listed.etag is not null)
                       or (listed.size is distinct from known.size and listed.size is not null) as changed
                from listed left join known using (uri) order by place
                """
            ).to_arrow_table()
            database.unregister("listed")
            keep = pc.or_(pc.invert(found["is_known"]), pc.fill_null(found["changed"], False))
            replaces = pc.if_else(found["is_known"], found["old"], pa.scalar(None, pa.int64()))
            marked = table.set_column(table.column_names.index("replaces"), "replaces", replaces)
            yield marked.filter(keep)


def superseded_rows(out: str, parts: list[ManifestPart], storage_options: Options) -> np.ndarray:
    """Rows that rows of `parts` (the parts that updates added) replace; int64, any order."""
    fs, path = filesystem(out, storage_options)
    found = [np.empty(0, np.int64)]
    for part in parts:
        with fs.open(join(path, "manifest", part.name), "rb") as file:
            column = pq.read_table(file, columns=["replaces"])["replaces"]
        found.append(column.drop_null().to_numpy())
    return np.concatenate(found)


def _load_known(
    database: duckdb.DuckDBPyConnection, out: str, parts: list[ManifestPart], storage_options: Options
) -> None:
    """The newest row of every address in the manifest, as the table `known`."""
    fs, path = filesystem(out, storage_options)
    database.sql("create table every (row bigint, uri varchar, etag varchar, size bigint)")
    for part in parts:
        with fs.open(join(path, "manifest", part.name), "rb") as file, pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=["row", "uri", "etag", "size"]):
                database.register("batch", pa.table(batch))
                database.sql("insert into every select row, uri, etag, size from batch")
                database.unregister("batch")
    database.sql(
        "create table known as select max(row) as row, uri, arg_max(etag, row) as etag, "
        "arg_max(size, row) as size from every group by uri"
    )
