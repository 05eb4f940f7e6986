"""Tables as sources: CSV, JSONL and Parquet with a `uri` column, and Parquet with the image bytes themselves.

Each reader yields Arrow tables with the manifest's columns (without `row`) and the user's own columns behind them.
"""

import os
import posixpath
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from pipeline.storage import Options, filesystem, redact, scheme
from schemas.errors import SourceError
from schemas.tables import MANIFEST_FIELDS, user_column_name

CONTENT_FIELDS = MANIFEST_FIELDS[1:]  # `row` is given out when the manifest is frozen
_BATCH_ROWS = 16_384


def read_uri_table(source: str, uri_column: str, storage_options: Options) -> Iterator[pa.Table]:
    """Rows of a CSV, JSONL or Parquet table that names images in `uri_column`.

    A relative name is taken from the table's own folder. Raises SourceError when the column is missing or the
    file is not such a table.
    """
    for batch in _read_batches(source, storage_options):
        if uri_column not in batch.column_names:
            raise SourceError(
                f"{redact(source)} has no column `{uri_column}`; it has {', '.join(batch.column_names)}. "
                "Name the column that holds the image addresses with --uri-column"
            )
        uris = _absolute(source, batch[uri_column])
        yield content_table(uris, {}, batch.drop_columns([uri_column]))


def read_image_table(source: str, column: str, storage_options: Options) -> Iterator[pa.Table]:
    """Rows of a Parquet table that holds image bytes in `column`: binary, or Hugging Face's `{bytes, path}`.

    Only the other columns and the `path` are read here; the bytes are fetched when their row's turn comes.
    """
    fs, path = filesystem(source, storage_options)
    with fs.open(path, "rb") as file, pq.ParquetFile(file) as parquet:
        nested = pa.types.is_struct(parquet.schema_arrow.field(column).type)
        others = [name for name in parquet.schema_arrow.names if name != column]
        first = 0
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=[*others, *([f"{column}.path"] if nested else [])]):
            table = pa.table(batch) if batch.num_columns else pa.table({"_": pa.nulls(batch.num_rows)})
            rows = range(first, first + batch.num_rows)
            names = batch.column(column).field("path").to_pylist() if nested else [None] * batch.num_rows
            uris = [f"{source}#{name or row}" for name, row in zip(names, rows, strict=True)]
            fixed: dict[str, list[Any]] = {"container": [source] * len(uris), "offset": list(rows)}
            yield content_table(pa.array(uris, pa.string()), fixed, table.select(others))
            first += batch.num_rows


def parquet_kind(source: str, uri_column: str, image_column: str, storage_options: Options) -> tuple[str, str] | None:
    """`("uri", column)`, `("image", column)`, or None for a Parquet file that is neither.

    Raises SourceError when the file is not Parquet.
    """
    fs, path = filesystem(source, storage_options)
    try:
        with fs.open(path, "rb") as file:
            schema = pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{redact(source)} is not a Parquet file ({error})") from error
    if uri_column in schema.names:
        return "uri", uri_column
    candidates = [field.name for field in schema if _holds_images(field.type)]
    if image_column in candidates:
        return "image", image_column
    return ("image", candidates[0]) if len(candidates) == 1 else None


def content_table(uris: pa.Array, fixed: dict[str, list[Any]], user: pa.Table) -> pa.Table:
    """A manifest table without `row`: `uris`, the fixed columns that are known, nulls for the others, `user`."""
    columns: list[pa.Array] = []
    for field in CONTENT_FIELDS:
        if field.name == "uri":
            columns.append(uris)
        elif field.name in fixed:
            columns.append(pa.array(fixed[field.name], field.type))
        else:
            columns.append(pa.nulls(len(uris), field.type))
    names = [field.name for field in CONTENT_FIELDS]
    mine = [user_column_name(name) for name in user.column_names]
    clash = {name for name in mine if mine.count(name) > 1}
    if clash:
        raise SourceError(f"two columns of the table would both be called `{sorted(clash)[0]}`; rename one of them")
    fields = [*CONTENT_FIELDS, *(pa.field(name, user.schema.field(i).type) for i, name in enumerate(mine))]
    table = pa.Table.from_arrays([*columns, *user.columns], names=[*names, *mine])
    return table.cast(pa.schema(fields))


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return {"bytes", "path"} <= names and _holds_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _read_batches(source: str, storage_options: Options) -> Iterator[pa.Table]:
    fs, path = filesystem(source, storage_options)
    suffix = path.lower().rpartition(".")[2]
    try:
        with fs.open(path, "rb") as file:
            if suffix == "parquet":
                for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS):
                    yield pa.table(batch)
            elif suffix in {"csv", "tsv"}:
                options = pa_csv.ParseOptions(delimiter="\t" if suffix == "tsv" else ",", newlines_in_values=True)
                for batch in pa_csv.open_csv(file, parse_options=options):
                    yield pa.table(batch)
            else:
                for batch in pa_json.open_json(file):
                    yield pa.table(batch)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{redact(source)} cannot be read as {suffix.upper()}: {error}") from error


def _absolute(source: str, column: pa.ChunkedArray) -> pa.Array:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise SourceError(f"{redact(source)}: the address column holds {column.type}, text is needed")
    folder = source.rpartition("/")[0]
    local = scheme(source) == "file"

    def resolve(uri: str | None) -> str:
        if not uri or "://" in uri or uri.startswith("/"):
            return uri or ""
        joined = posixpath.normpath(posixpath.join(folder, uri)) if local else f"{folder}/{uri}"
        return os.path.abspath(joined) if local else joined

    return pa.array([resolve(uri) for uri in column.to_pylist()], pa.string())
