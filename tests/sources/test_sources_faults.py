"""A source that fails while it is looked at is an error, and no row."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from support.faults import Rule
from support.http_server import HttpServer
from support.source_rows import ROWS, rows_of, spec_of

from pipeline.sources.reading import open_object
from schemas.errors import SourceError


class _Broken(MemoryFile):
    error: OSError

    def read(self, size: int = -1) -> bytes:
        raise self.error


class _Failing(MemoryFileSystem):
    """As a mounted or a remote file system of which files can be opened and not be read."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("failing:/")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> MemoryFile:
        file = super()._open(path, mode, **options)
        return _Broken(self, path, file.getvalue()) if mode == "rb" else file


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, os.strerror(errno.EIO)), TimeoutError("no answer"), ConnectionError("lost")],
    ids=["EIO", "timeout", "connection"],
)
@pytest.mark.parametrize("source", ["failing://tables", "failing://tables/a.parquet"])
def test_a_table_that_cannot_be_read_is_no_row(monkeypatch: pytest.MonkeyPatch, source: str, error: OSError) -> None:
    fsspec.register_implementation("failing", _Failing, clobber=True)
    monkeypatch.setattr(_Broken, "error", error, raising=False)
    table = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), table)
    fsspec.filesystem("failing").pipe({"/tables/a.parquet": table.getvalue().to_pybytes()})
    with pytest.raises(SourceError, match=r"a\.parquet: cannot be read \(.*" + str(error.strerror or error)):
        rows_of(spec_of(source))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOENT])
def test_a_shard_without_room_for_a_copy_is_asked_for_each_time(
    number: int, tmp_path: Path, http_server: Callable[..., HttpServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a server that ignores ranges."""
    content = bytes(range(256)) * 8192
    (tmp_path / "a.bin").write_bytes(content)
    server = http_server(tmp_path, [Rule("ignore_range")])

    def full(**options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with open_object(server.url_of("a.bin"), {}) as file:
        assert file.read() == content
