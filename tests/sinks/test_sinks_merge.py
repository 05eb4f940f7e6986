"""Parts that are merged: in the order of their rows, each once, whatever the length of their texts."""

from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sinks import compaction
from pipeline.sinks.parts import write_part
from schemas.errors import OutputError

FS = fsspec.filesystem("file")


def merged(out: Path) -> pa.Table:
    (file,) = (out / "images").iterdir()
    return pq.read_table(file)


@pytest.mark.parametrize("rows", [1, 3, 7, 1 << 12])
def test_parts_that_lie_within_one_another(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "_TAKEN_ROWS", rows)
    parts = [[0, 9, 10, 30], [1, 2, 3, 11], [4, 5, 9, 31], [6], [7, 8, 40, 41]]  # 9 stands twice
    for number, place in enumerate(parts):
        table = pa.table({"row": place, "text": [f"{row} of {number}" for row in place]})
        write_part(FS, str(tmp_path), "images", table, b"{}")
    assert compaction.compact(str(tmp_path), 1 << 20, {}) == len(parts)
    table = merged(tmp_path)
    assert table["row"].to_pylist() == sorted({row for place in parts for row in place})
    owners = {row: number for number, place in reversed(list(enumerate(parts))) for row in place}
    assert table["text"].to_pylist() == [f"{row} of {owners[row]}" for row in table["row"].to_pylist()]
    assert table.schema.metadata[b"patchstream"] == b"{}"


def test_a_part_whose_rows_do_not_ascend_loses_none(tmp_path: Path) -> None:
    for place in ([5, 1], [2, 3]):
        write_part(FS, str(tmp_path), "images", pa.table({"row": place}), b"{}")
    before = sorted(path.name for path in (tmp_path / "images").iterdir())
    with pytest.raises(OutputError, match="the rows of a part do not ascend"):
        compaction.compact(str(tmp_path), 1 << 20, {})
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == before


@pytest.mark.long
def test_more_text_than_one_array_holds(tmp_path: Path) -> None:
    """Here 2.2 GiB, which are a few hundred KiB on the disk."""
    count, length, parts = 18_000, 1 << 17, 3
    text = "x" * (length - 8)
    for part in range(parts):
        rows = range(part, count, parts)
        table = pa.table({"row": list(rows), "text": [f"{text}{row:08d}" for row in rows]})
        write_part(FS, str(tmp_path), "images", table, b"{}")
    assert compaction.compact(str(tmp_path), 256 << 20, {}) == parts
    (file,) = (tmp_path / "images").iterdir()
    rows = 0
    for batch in pq.ParquetFile(file).iter_batches(1000):
        assert [text[-8:] for text in batch["text"].to_pylist()] == [f"{row:08d}" for row in batch["row"].to_pylist()]
        rows += len(batch)
    assert rows == count
