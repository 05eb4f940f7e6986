"""Reading some columns of Parquet files on a store: how far ahead, and a file system for libraries that open files."""

from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem

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
