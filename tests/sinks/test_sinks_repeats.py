"""Rows that come twice in one write, or stand twice in one part: each is kept once, and hides no other."""

from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sinks import attempts, compaction
from pipeline.sinks.ledger import pending, read_ledger
from pipeline.sinks.parts import write_part
from pipeline.sinks.ray_writer import WriteJob, write_blocks
from schemas.tables import images_schema, output_fields, predicted_schema
from schemas.values import WHOLE

FS = fsspec.filesystem("file")
OUTPUTS = output_fields({"cls": 2}, "float32", labels=False)


def block(*rows: int, failed: tuple[int, ...] = ()) -> pa.Table:
    lines = []
    for row in rows:
        line = {"row": row, "uri": f"file:///{row}.jpg"}
        failure = {"stage": "fetch", "error": "TimedOut", "message": "m", "attempts": 4, "retryable": True}
        lines.append(line | (failure if row in failed else {"cls": [float(row), 1.0]}))
    return pa.Table.from_pylist(lines, schema=predicted_schema(OUTPUTS, []))


def rows_in(out: Path, folder: str) -> list[int]:
    return [row for file in sorted((out / folder).glob("*")) for row in pq.read_table(file)["row"].to_pylist()]


@pytest.mark.parametrize(
    ("blocks", "images", "failures", "left"),
    [
        ([block(0, 1), block(1, 2)], [0, 1, 2], [], [[3, 4]]),
        ([block(0), block(0, 2)], [0, 2], [], [[1, 2], [3, 4]]),
        ([block(0, 1, failed=(0, 1)), block(1, 2, failed=(2,))], [1], [0, 2], [[3, 4]]),
        ([block(0, 1), block(1, 2, failed=(1,))], [0, 1, 2], [], [[3, 4]]),
        ([block(3, failed=(3,)), block(3, failed=(3,))], [], [3], [[0, 3]]),
    ],
)
def test_a_repeated_task_that_cut_its_blocks_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    blocks: list[pa.Table], images: list[int], failures: list[int], left: list[list[int]],
) -> None:  # fmt: skip
    """As many rows twice as are missing made a part look dense: those that were missing counted as done."""
    monkeypatch.setattr("pipeline.logs.working_on", lambda *arguments: None)  # the log of a worker, which this is not
    out = str(tmp_path)
    fence, _ = attempts.claim(out, WHOLE, {}, "embed")
    done = write_blocks(WriteJob(fence, images_schema(OUTPUTS, []), b"{}", "r"), *blocks)
    assert (rows_in(tmp_path, "images"), rows_in(tmp_path, "failures")) == (images, failures)
    assert (done.images, done.failures) == (len(images), len(failures))
    ledger = read_ledger(out, {})
    assert len(ledger.twice) == 0
    assert pending(ledger, 0, 4).tolist() == left


@pytest.mark.parametrize("rows", [[0, 1, 1, 2], [0, 0, 0, 1, 2, 2]])
def test_a_part_of_an_earlier_version_that_holds_rows_twice_is_mended(tmp_path: Path, rows: list[int]) -> None:
    for folder, place in (("images", rows), ("images", [2, 3]), ("failures", [4, 7, 7]), ("images", [8, 9])):
        table = pa.table({"row": place, "text": [f"{number}. of {folder}" for number in range(len(place))]})
        write_part(FS, str(tmp_path), folder, table, b"{}")
    twice = read_ledger(str(tmp_path), {}).twice
    surplus = len(rows) - 3 + 1 + 1
    assert compaction.drop_repeats(str(tmp_path), twice, {}) == surplus
    assert rows_in(tmp_path, "images") == [0, 1, 2, 3, 8, 9]
    assert rows_in(tmp_path, "failures") == [4, 7]
    ledger = read_ledger(str(tmp_path), {})
    assert len(ledger.twice) == 0
    assert pending(ledger, 0, 10).tolist() == [[5, 7]]
    (first,) = (tmp_path / "images").glob("part-000000000000-*")
    kept = pq.read_table(first)["text"].to_pylist()
    assert kept == [f"{number}. of images" for number in np.unique(rows, return_index=True)[1]]
