"""How a part is written, for all who write some: as the bytes of a Parquet file."""

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.tables import METADATA_KEY

# About a megabyte of addresses and small columns; keeps a filtered read from touching everything.
_GROUP_ROWS = 1 << 14
_GROUP_BYTES = 128 << 20


def encode(table: pa.Table, metadata: bytes) -> bytes:
    """`table` as the bytes of a Parquet file.

    Floats are left uncompressed, since zstd takes time on them and gains next to nothing. Pages carry checksums,
    which `verify` reads back. Row groups stay small enough that a reader who wants one row of patch features does
    not fetch gigabytes.
    """
    compression = {}
    for column in pq.ParquetFile(_probe(table.schema)).schema:
        # Not by what stands before the first dot: a column of the user's may be called `cls.note`.
        is_feature = column.path.replace(".list.element", "") in {"cls", "pooled", "patches"}
        compression[column.path] = "none" if is_feature else "zstd"
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({METADATA_KEY: metadata}),
        sink,
        row_group_size=max(1, min(_GROUP_ROWS, _GROUP_BYTES * table.num_rows // max(1, table.nbytes))),
        compression=compression,
        use_dictionary=[path for path, codec in compression.items() if codec == "zstd"],
        write_page_checksum=True,
    )
    return bytes(sink.getvalue())


def _probe(schema: pa.Schema) -> pa.BufferReader:
    """An empty file of this schema: Parquet's own names for nested columns."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    return pa.BufferReader(sink.getvalue())
