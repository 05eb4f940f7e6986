"""Reading Parquet files on a store: how far ahead for some columns, what they hold, and what is damage in them."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem

from pipeline.store_errors import error_number

# The drivers' own 5 to 50 MiB would be most of the vectors that lie between two narrow columns. A wide column is asked
# for in large pieces whatever is read ahead.
READ_AHEAD_BYTES = 256 * 1024


def open_columns(fs: AbstractFileSystem, path: str) -> Any:
    """A Parquet file, open for somebody who wants some of its columns."""
    return fs.open(path, "rb", block_size=READ_AHEAD_BYTES)


class ColumnReads(DirFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A folder of a store; of its files little is read beyond what is asked for."""

    def open(self, path: str, *args: Any, **options: Any) -> Any:
        """As fsspec's, whatever read-ahead the caller or the driver would choose."""
        return super().open(path, *args, **options | {"block_size": READ_AHEAD_BYTES})


def places_of(metadata: pq.FileMetaData, columns: Sequence[str]) -> list[int]:
    """Where the leaves of `columns`, which may be fields of a column (`image.path`), stand in each row group."""
    inside = tuple(f"{column}." for column in columns)
    places = range(metadata.num_columns)
    return [place for place in places if f"{metadata.schema.column(place).path}.".startswith(inside)]


def held_bytes(group: pq.RowGroupMetaData, places: Sequence[int]) -> int:
    """What a row group holds of them, uncompressed."""
    return sum(group.column(place).total_uncompressed_size for place in places)


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold pictures: their bytes, or Hugging Face's `{bytes, path}`."""
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return {"bytes", "path"} <= names and holds_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_damage(error: Exception) -> bool:
    """Whether an error while a file was read says that its content is wrong. The others say nothing of the content: a
    store that refused or failed, too little memory.

    Arrow raises exceptions of its own, and for some damage a plain OSError without a number.
    """
    if isinstance(error, MemoryError):
        return False
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and not error_number(error))
