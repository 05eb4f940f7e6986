"""SQL over a run: DuckDB with the run's tables as views, cosine similarity and nearest neighbours.

cosine(a, b)          of two vectors
nearest(row, k)       table (row, uri, score): the k rows most like this one by `cls`, or the first feature there is
nearest_NAME(row, k)  the same by feature NAME
"""

from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
from fsspec import AbstractFileSystem

from pipeline.retrieval.output import staged
from pipeline.retrieval.query import execute, literal, quote, refused, run_query
from pipeline.retrieval.store import FeatureStore
from pipeline.signals import heeding_signals
from pipeline.storage import Options, filesystem, redact
from schemas.errors import SpecError

_FORMATS = {".parquet": "FORMAT parquet, COMPRESSION zstd", ".csv": "FORMAT csv, HEADER"}


class Answer(NamedTuple):
    """The first rows of a result, and whether there are more."""

    table: pa.Table
    more: bool


def connect(store: FeatureStore) -> duckdb.DuckDBPyConnection:
    """The store's connection with our functions."""
    connection = store.connect()
    cosine = "list_cosine_similarity(CAST(a AS FLOAT[]), CAST(b AS FLOAT[]))"
    execute(connection, f"CREATE MACRO cosine(a, b) AS {cosine}")
    connection.register("_replaced", pa.table({"row": pa.array(store.replaced, pa.int64())}))
    for name in store.features:
        execute(connection, _nearest(f"nearest_{name}", name))
    if store.features:
        execute(connection, _nearest("nearest", next(iter(store.features))))
    return connection


def _nearest(macro: str, feature: str) -> str:
    # NaN sorts above every number in DuckDB, so vectors without direction have to be left out by name.
    score = f"cosine({quote(feature)}, (SELECT {quote(feature)} FROM images WHERE row = of_row))"
    return (
        f"CREATE MACRO {macro}(of_row, k) AS TABLE SELECT row, uri, score FROM "
        f"(SELECT row, uri, {score} AS score FROM images ANTI JOIN _replaced USING (row) WHERE row <> of_row) "
        "WHERE isfinite(score) ORDER BY score DESC, row LIMIT k"
    )


def ask(store: FeatureStore, query: str, limit: int) -> Answer:
    """The first `limit` rows of a query's result. Raises as `run_query` does."""

    def asked() -> pa.Table:
        with connect(store) as connection:
            return run_query(connection, query, limit + 1)

    found = store.reread(asked)
    return Answer(found.slice(0, limit), found.num_rows > limit)


def write(store: FeatureStore, query: str, out: str, storage_options: Options | None = None) -> int:
    """Write a query's result to `out`, a .parquet or .csv file on any store; returns the number of rows.

    Raises SpecError for another ending or a query that DuckDB refuses.
    """
    suffix = Path(out).suffix.lower()
    if suffix not in _FORMATS:
        raise SpecError(f"--out {redact(out)}: the name ends in {' or '.join(_FORMATS)}")
    fs, path = filesystem(out, storage_options or {})
    return store.reread(lambda: _write(store, query, fs, path, _FORMATS[suffix]))


def _write(store: FeatureStore, query: str, fs: AbstractFileSystem, path: str, form: str) -> int:
    with connect(store) as connection, staged(fs, path) as local:

        def copy() -> Any:
            query_result: Any = connection.sql(query)
            if query_result is None:
                raise SpecError(f"the query gives no table to write: {query}")
            # DuckDB finds the relation by the name of the variable. COPY says how many rows it wrote; reading a CSV
            # back would guess at its quoting from the first rows.
            target = f"{literal(str(local))} ({form})"
            return connection.execute(f"COPY (SELECT * FROM query_result) TO {target}").fetchone()

        try:
            counted = heeding_signals(copy, connection.interrupt)
        except duckdb.Error as error:
            raise refused(error, query) from None
    return int(counted[0]) if counted else 0
