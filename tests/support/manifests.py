"""Small manifests, made by hand."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.images.stage import Reading, fetch_and_decode
from schemas.preprocessing import Preprocessing
from schemas.tables import manifest_schema

SMALL = Preprocessing(resize=(32, 32))


def manifest_of(
    uris: Sequence[str | Path], *, user: Mapping[str, pa.Array] | None = None, **columns: Sequence[Any]
) -> pa.Table:
    """A manifest with one row for each of `uris`; `columns` are those of the manifest schema, null by default."""
    extra = dict(user or {})
    schema = manifest_schema([pa.field(name, array.type) for name, array in extra.items()])
    values = {"row": range(len(uris)), "uri": [str(uri) for uri in uris], **columns}
    arrays = [
        extra[field.name] if field.name in extra else pa.array(values.get(field.name, [None] * len(uris)), field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)


def decode_all(manifest: pa.Table, **options: Any) -> pa.Table:
    """All of `fetch_and_decode`, as one table; small pictures, few rows in a batch, unless `options` say otherwise."""
    return pa.concat_tables(decode_batches(manifest, **options))


def decode_batches(manifest: pa.Table, **options: Any) -> Iterator[pa.Table]:
    """The tables of `fetch_and_decode` one by one."""
    reading = {name: options.pop(name) for name in Reading._fields if name in options}
    return fetch_and_decode(manifest, Reading(**{"preprocessing": SMALL, **reading}), **{"batch_rows": 16, **options})
