"""One source string to the manifest rows behind it, whatever it turns out to be."""

import logging
import tarfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from pipeline.sources.listing import Entry, list_source, wanted
from pipeline.sources.tables import content_table, parquet_kind, read_image_table, read_uri_table
from pipeline.sources.tar import SIDECARS, list_tar
from pipeline.storage import Options, redact, scheme
from schemas.errors import SourceError
from schemas.spec import JobSpec

_log = logging.getLogger(__name__)

_TEXT_TABLES = frozenset({"csv", "tsv", "jsonl", "ndjson"})
_BATCH_ROWS = 16_384


def expand(source: str, spec: JobSpec) -> Iterator[pa.Table]:
    """Manifest rows (without `row`) of one source, in batches.

    A text table is one only where it is named as such (`labels.csv`, `tables/*.csv`), because a stray CSV beside
    images is no list of images. Tar shards and Parquet tables are opened wherever they turn up.
    Raises SourceError when the source cannot be read.
    """
    if suffix(source) in _TEXT_TABLES:
        for entry in list_source(source, spec.storage_options):
            yield from read_uri_table(entry.uri, spec.uri_column, spec.storage_options)
        return
    named = suffix(source) == "parquet"
    plain: list[Entry] = []
    for entry in _skip_output(list_source(source, spec.storage_options), spec.out):
        if not wanted(entry.uri, spec.include, spec.exclude):
            continue
        tables = _container(entry, spec, named)
        if tables is None:
            plain.append(entry)
        if plain and (tables is not None or len(plain) == _BATCH_ROWS):
            yield _plain_table(plain)
            plain = []
        if tables is not None:
            yield from tables
    if plain:
        yield _plain_table(plain)


def suffix(source: str) -> str:
    """Lower-case suffix of the last path segment, without the dot and without a query string."""
    path = urlsplit(source).path if scheme(source) == "http" else source
    return path.rpartition("/")[2].rpartition(".")[2].lower()


def _container(entry: Entry, spec: JobSpec, named: bool) -> Iterator[pa.Table] | None:
    kind = suffix(entry.uri)
    if kind == "tar":
        return _tar_tables(entry, spec.storage_options)
    if kind != "parquet":
        return None
    try:
        found = parquet_kind(entry.uri, spec.uri_column, spec.image_column, spec.storage_options)
    except SourceError:
        if named:
            raise
        return None
    if found is None:
        if named:
            raise SourceError(
                f"{redact(entry.uri)} has neither a column `{spec.uri_column}` with addresses nor one column with "
                "image bytes; name it with --uri-column or --image-column"
            )
        return None
    what, column = found
    read = read_uri_table if what == "uri" else read_image_table
    return read(entry.uri, column, spec.storage_options)


def _tar_tables(entry: Entry, storage_options: Options) -> Iterator[pa.Table]:
    samples: list[dict[str, Any]] = []
    try:
        for sample in list_tar(entry.uri, storage_options):
            samples.append(sample)
            if len(samples) == _BATCH_ROWS:
                yield _tar_table(entry, samples)
                samples = []
    except tarfile.ReadError as error:
        # The shard itself becomes a row, so that what could not be listed shows up among the failures.
        _log.warning("%s: %s", redact(entry.uri), error)
        yield _plain_table([entry])
    if samples:
        yield _tar_table(entry, samples)


def _tar_table(entry: Entry, samples: list[dict[str, Any]]) -> pa.Table:
    fixed: dict[str, list[Any]] = {
        "container": [entry.uri] * len(samples),
        "offset": [sample["offset"] for sample in samples],
        "length": [sample["length"] for sample in samples],
        "size": [sample["length"] for sample in samples],
        "etag": [entry.etag] * len(samples),
    }
    present = [name for name in SIDECARS if any(name in sample for sample in samples)]
    sidecars = {name: pa.array([sample.get(name) for sample in samples], pa.string()) for name in present}
    uris = pa.array([f"{entry.uri}#{sample['name']}" for sample in samples], pa.string())
    user = pa.table(sidecars) if present else pa.table({"_": pa.nulls(len(samples))}).select([])
    return content_table(uris, fixed, user)


def _plain_table(entries: list[Entry]) -> pa.Table:
    fixed: dict[str, list[Any]] = {"size": [entry.size for entry in entries], "etag": [entry.etag for entry in entries]}
    uris = pa.array([entry.uri for entry in entries], pa.string())
    return content_table(uris, fixed, pa.table({"_": pa.nulls(len(entries))}).select([]))


def _skip_output(entries: Iterator[Entry], out: str) -> Iterator[Entry]:
    """What an earlier run wrote below the source is no input."""
    inside = out.rstrip("/") + "/"
    return (entry for entry in entries if not entry.uri.startswith(inside))
