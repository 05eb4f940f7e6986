"""Tables as sources: CSV, TSV, JSONL and Parquet with a `uri` column, and Parquet with the image bytes themselves.

Each reader yields Arrow tables with the manifest's columns (without `row`) and the user's own columns behind them.
"""

import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.addresses import NO_CHAINS, behind_caches, file_name, is_chained, scheme
from pipeline.columns import held_bytes, holds_images, is_damage, places_of
from pipeline.sources.columns import content_table
from pipeline.sources.reading import open_object, source_error
from pipeline.sources.stores import Entry
from pipeline.sources.text import TEXT_SUFFIXES, read_text
from pipeline.storage import Options, redact
from schemas.errors import SourceError
from schemas.spec import JobSpec
from schemas.tables import MANIFEST_FIELDS, METADATA_KEY

BATCH_ROWS = 16_384
_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
# Rows of long texts make shorter batches.
_BATCH_BYTES = 32 << 20
# What begins behind a path: a query and a fragment on the web, a version on S3.
_NO_PATH = {"http": "?#", "s3": "?"}


class ParquetKind(NamedTuple):
    """What a Parquet file is to us: `uris` and `images` name the columns that hold them; `ours` if we wrote it.

    `left_out` are the other columns of pictures (masks, edited versions) beside `images`: riding along, they would
    make the manifest a copy of the table.
    """

    uris: str | None
    images: str | None
    ours: bool
    left_out: tuple[str, ...] = ()
    # Rows, and bytes of images, of the row group with the most rows.
    group: tuple[int, int] = (0, 0)


def suffix(source: str) -> str:
    """Lower-case suffix of the last path segment, without the dot, a query string or a `.gz` behind a text table's."""
    stem, _, last = file_name(source).lower().rpartition(".")
    inner = stem.rpartition(".")[2]
    return inner if last == "gz" and inner in TEXT_SUFFIXES else last


def read_uri_table(source: str, uri_column: str, storage_options: Options) -> Iterator[pa.Table]:
    """Rows of a CSV, TSV, JSONL or Parquet table that names images in `uri_column`.

    A relative name is taken from the table's own folder. A row without an address is kept: it becomes a failure.
    Raises SourceError when the column is missing or the file is not such a table.
    """
    kind = suffix(source)
    batches = (
        _read_parquet(source, storage_options)
        if kind == "parquet"
        else read_text(source, kind, uri_column, storage_options)
    )
    for table in batches:
        if table.column_names.count(uri_column) != 1:
            what = "more than one column" if uri_column in table.column_names else "no column"
            raise SourceError(
                f"{redact(source)} has {what} `{uri_column}`; it has {', '.join(table.column_names)}. "
                "Name the column that holds the image addresses with --uri-column"
            )
        uris = _absolute(source, _addresses(source, table[uri_column]))
        yield content_table(uris, {}, table.drop_columns([uri_column]))


def read_image_table(entry: Entry, kind: ParquetKind, storage_options: Options) -> Iterator[pa.Table]:
    """Rows of a Parquet table that holds image bytes: binary, or Hugging Face's `{bytes, path}`.

    Only the other columns and the `path` are read here; the bytes are fetched when their row's turn comes. A row is
    named by its address where the table has one, else by its `path`, else by its number.
    """
    source, column = entry.uri, str(kind.images)
    with _parquet(source, storage_options) as parquet:
        nested = pa.types.is_struct(parquet.schema_arrow.field(column).type)
        others = [name for name in parquet.schema_arrow.names if name != column and name not in kind.left_out]
        columns = [*others, *([f"{column}.path"] if nested else [])]
        first = 0
        for batch in parquet.iter_batches(_batch_rows(parquet, columns), columns=columns):
            rows = range(first, first + batch.num_rows)
            paths = batch.column(column).field("path").to_pylist() if nested else [None] * batch.num_rows
            names = [f"{source}#{path or row}" for path, row in zip(paths, rows, strict=True)]
            user = pa.table(batch).select(others) if others else None
            if user is not None and kind.uris is not None:
                given = _absolute(source, _addresses(source, user[kind.uris]))
                names = [address or name for address, name in zip(given, names, strict=True)]
                user = user.drop_columns([kind.uris])
            fixed: dict[str, Sequence[Any]] = {
                "container": [source] * len(rows),
                "offset": list(rows),
                "etag": [_version(entry)] * len(rows),
            }
            yield content_table(names, fixed, user)
            first += batch.num_rows


def _version(entry: Entry) -> str | None:
    """Changes when the table does: its rows have no size or ETag of their own."""
    return entry.etag if entry.size is None else f"{entry.etag or ''}-{entry.size:x}"


def parquet_kind(source: str, uri_column: str, image_column: str, storage_options: Options) -> ParquetKind | None:
    """What the Parquet file `source` is to us; None when it is no Parquet file.

    Bytes in the column `image_column` go before addresses; bytes elsewhere count where no other name was asked for,
    there are no addresses, and no other column holds any. Raises SourceError when the file cannot be reached.
    """
    with open_object(source, storage_options) as file:
        try:
            metadata = pq.read_metadata(file)
            schema = metadata.schema.to_arrow_schema()
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error):
                raise source_error(source, error) from error
            return None
    uris = uri_column if uri_column in schema.names else None
    candidates = [field.name for field in schema if holds_images(field.type)]
    images = image_column if image_column in candidates else None
    asked = image_column != JobSpec.model_fields["image_column"].default
    if uris is None and images is None and not asked and len(candidates) == 1:
        images = candidates[0]
    pictures = [field.name for field in schema if holds_images(_value_type(field.type)) and field.name != images]
    # pyarrow keeps our mark in whatever a user makes of a run's tables; all of ours begin with the same columns, too.
    marked = METADATA_KEY in (schema.metadata or {}) and schema.names[:2] == ["row", "uri"]
    # Manifests of earlier versions are known by their columns alone.
    ours = marked or list(schema)[: len(MANIFEST_FIELDS)] == MANIFEST_FIELDS
    if images is None:
        return ParquetKind(uris, None, ours)
    return ParquetKind(uris, images, ours, tuple(pictures), _largest_group(metadata, images))


def _largest_group(metadata: pq.FileMetaData, column: str) -> tuple[int, int]:
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    largest = max(groups, key=lambda group: group.num_rows, default=None)
    return (0, 0) if largest is None else (largest.num_rows, held_bytes(largest, places_of(metadata, [column])))


def _value_type(kind: pa.DataType) -> pa.DataType:
    """What the lists, if it is one, are made of."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return _value_type(kind.value_type) if is_list else kind


@contextmanager
def _parquet(source: str, storage_options: Options) -> Iterator[pq.ParquetFile]:
    """The table, its column chunks fetched ahead in few reads. Raises SourceError for what is damaged or no Parquet."""
    with open_object(source, storage_options) as file:
        try:
            with pq.ParquetFile(file, pre_buffer=True) as parquet:
                yield parquet
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{redact(source)} cannot be read as Parquet: {redact(str(error))}") from error


def _read_parquet(source: str, storage_options: Options) -> Iterator[pa.Table]:
    with _parquet(source, storage_options) as parquet:
        yield parquet.schema_arrow.empty_table()
        for batch in parquet.iter_batches(_batch_rows(parquet, parquet.schema_arrow.names)):
            yield pa.table(batch)


def _batch_rows(parquet: pq.ParquetFile, columns: list[str]) -> int:
    """How many rows of `columns`, which may be fields of a column (`image.path`), make a batch."""
    metadata, places = parquet.metadata, places_of(parquet.metadata, columns)
    held = sum(held_bytes(metadata.row_group(number), places) for number in range(metadata.num_row_groups))
    return int(max(1, min(BATCH_ROWS, _BATCH_BYTES * metadata.num_rows // max(1, held))))


def _addresses(source: str, column: pa.ChunkedArray) -> list[str | None]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not any(is_text(kind) for is_text in _TEXT_TYPES):
        raise SourceError(f"{redact(source)}: the address column holds {column.type}, text is needed")
    values: list[str | None] = column.to_pylist()
    return values


def _absolute(source: str, uris: list[str | None]) -> list[str]:
    """Addresses as the workers need them: a relative one begins at the table's folder."""
    if scheme(source) == "file":
        folder = os.path.dirname(os.path.abspath(source.removeprefix("file://")))
        return [_absolute_path(folder, uri) for uri in uris]
    kind = scheme(behind_caches(source))
    if kind == "http":
        source = urlunsplit(urlsplit(source)._replace(query="", fragment=""))
    inside, mark, archive = source.partition("::")
    if is_chained(source) and "://" in inside:
        place, _, path = inside.partition("://")
        above = posixpath.dirname(path)
        return [_absolute_url(f"{place}://", partial(_joined, above), uri, rest=mark + archive) for uri in uris]
    place, _, path = source.rpartition("/")[0].partition("://")
    root, slash, folder = path.partition("/")
    join = partial(_joined_keys, f"{folder}{slash}") if kind in NO_CHAINS else partial(_joined, folder)
    return [_absolute_url(f"{place}://{root}/", join, uri, _NO_PATH.get(kind, "")) for uri in uris]


def _local_path(uri: str) -> str:
    """Hadoop and Spark write the path of a local file as `file:/…`."""
    return uri.partition(":")[2] if uri.startswith(("file:/", "local:/")) else uri


def _absolute_path(folder: str, uri: str | None) -> str:
    if not uri or "://" in uri:
        return uri or ""
    return os.path.normpath(os.path.join(folder, _local_path(uri)))


def _absolute_url(root: str, join: Callable[[str], str], uri: str | None, marks: str = "", rest: str = "") -> str:
    """`marks` are the characters with which begins what is no path and stays as it is."""
    path = uri or ""
    for mark in marks:
        path = path.partition(mark)[0]
    if not uri or "://" in path:
        return uri or ""
    local = _local_path(uri)
    return local if local.startswith("/") else f"{root}{join(path)}{uri[len(path) :]}{rest}"


def _joined(folder: str, path: str) -> str:
    return posixpath.normpath(posixpath.join(folder, path))


def _joined_keys(folder: str, path: str) -> str:
    """`folder` with its slash and `path`, without `.` and `..` (RFC 3986, 5.2.4). An empty segment belongs to a key."""
    kept: list[str] = []
    segments = f"{folder}{path}".split("/")
    for segment in segments:
        if segment == ".." and kept and kept[-1] != "..":
            kept.pop()
        elif segment != ".":
            kept.append(segment)
    return "/".join(kept) + ("/" if kept and segments[-1] in {".", ".."} else "")
