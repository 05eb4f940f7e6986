"""Parts, ledger, compaction, verification and the fence, on a real disk."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec import AbstractFileSystem

from pipeline.sinks import compaction, intervals
from pipeline.sinks.ledger import pending, read_ledger, shard_rows
from pipeline.sinks.parts import Part, list_parts, part_name, split, write_part
from pipeline.sinks.verify import verify
from schemas.errors import OutputError
from schemas.preprocessing import Preprocessing
from schemas.run import ModelRecord, RunRecord
from schemas.tables import FAILURES_SCHEMA, images_schema, output_fields, predicted_schema

FS = fsspec.filesystem("file")
OUTPUTS = output_fields({"cls": 4}, "float32", labels=True)
SCHEMA = images_schema(OUTPUTS, [pa.field("note", pa.string())])
MODEL = ModelRecord(
    name="m", family="vit", architecture="ViT", digest="d", dtype="float32", hidden_size=4, num_labels=2,
    pooled="pooler", preprocessing=Preprocessing(resize=(8, 8)),
)  # fmt: skip


def record(rows: int) -> RunRecord:
    return RunRecord(
        run_id="r", created="2026-01-01T00:00:00+00:00", spec={}, model=MODEL, versions={}, manifest_rows=rows,
        manifest_parts=[],
    )  # fmt: skip


METADATA = record(0).part_metadata()


def predicted(rows: list[int], failed: tuple[int, ...] = ()) -> pa.Table:
    schema = predicted_schema(OUTPUTS, [pa.field("note", pa.string())])
    lines = []
    for row in rows:
        line = {"row": row, "uri": f"https://u:p@host/{row}.jpg?X-Amz-Signature=abc", "note": f"n{row}"}
        if row in failed:
            line |= {"stage": "decode", "error": "Truncated", "message": "m", "attempts": 1, "retryable": row % 2 == 0}
        else:
            line |= {"cls": [row, 1.0, 2.0, 3.0], "labels": [{"index": 1, "label": "x", "score": 0.5}], "width": 3}
        lines.append(line)
    return pa.Table.from_pylist(lines, schema=schema)


def write(out: Path, rows: list[int], failed: tuple[int, ...] = ()) -> None:
    images, failures = split(predicted(rows, failed), SCHEMA)
    write_part(FS, str(out), "images", images, METADATA)
    write_part(FS, str(out), "failures", failures, METADATA)


def rows_in(out: Path, folder: str = "images") -> list[int]:
    files = sorted((out / folder).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file)["row"].to_pylist()]


def test_split_sorts_separates_and_redacts(tmp_path: Path) -> None:
    images, failures = split(predicted([5, 3, 4], failed=(4,)), SCHEMA)
    assert images["row"].to_pylist() == [3, 5]
    assert failures["row"].to_pylist() == [4]
    assert failures.schema == FAILURES_SCHEMA
    assert "abc" not in str(images["uri"].to_pylist() + failures["uri"].to_pylist())
    assert "u:p" not in str(images["uri"].to_pylist())


def test_the_same_rows_land_on_the_same_name(tmp_path: Path) -> None:
    write(tmp_path, [1, 2, 9])
    write(tmp_path, [9, 2, 1])
    assert rows_in(tmp_path) == [1, 2, 9]
    assert part_name(np.array([1, 2, 9])) != part_name(np.array([1, 3, 9]))


def test_a_part_says_what_it_is(tmp_path: Path) -> None:
    write(tmp_path, [0])
    (file,) = (tmp_path / "images").glob("*.parquet")
    assert json.loads(pq.read_schema(file).metadata[b"patchstream"])["model"]["digest"] == "d"
    assert duckdb.sql(f"select labels[1].label, cls[1] from '{file}'").fetchall() == [("x", 0.0)]


def test_ledger_and_pending(tmp_path: Path) -> None:
    write(tmp_path, [0, 1, 2, 3, 4, 5], failed=(3,))
    write(tmp_path, [8])
    ledger = read_ledger(str(tmp_path), {})
    assert intervals.count(ledger.images) == 6
    assert intervals.count(ledger.failures) == 1
    assert pending(ledger, 0, 12).tolist() == [[6, 8], [9, 12]]
    assert pending(ledger, 0, 12, replaced=np.array([[6, 7]])).tolist() == [[7, 8], [9, 12]]
    assert len(ledger.twice) == 0


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, [0, 1])
    (tmp_path / "images" / "mine.parquet").write_bytes(b"x")
    (tmp_path / "images" / ".part-tmp").write_bytes(b"x")
    assert len(list_parts(FS, str(tmp_path))) == 1
    assert compaction.compact(str(tmp_path), 1 << 20, {}) == 0


def test_shards_cover_everything_once() -> None:
    for total in (0, 1, 7, 100):
        edges = [shard_rows(total, i, 3) for i in range(3)]
        assert [row for first, stop in edges for row in range(first, stop)] == list(range(total))


def test_compaction_keeps_every_row_once(tmp_path: Path) -> None:
    for start in range(0, 40, 4):
        write(tmp_path, [start, start + 2, start + 1, start + 3], failed=(start + 1,))
    assert compaction.compact(str(tmp_path), 1 << 20, {}) == 20
    assert len(list((tmp_path / "images").glob("*.parquet"))) == 1
    assert rows_in(tmp_path) == [row for row in range(40) if row % 4 != 1]
    assert rows_in(tmp_path, "failures") == list(range(1, 40, 4))
    assert not (tmp_path / "_swap").exists()
    result = verify(str(tmp_path), record(40).model_copy(update={"run_id": "r"}), intervals.EMPTY, SCHEMA, {})
    assert result.problems == []


def test_compaction_stays_near_its_target(tmp_path: Path) -> None:
    for row in range(12):
        write(tmp_path, [row])
    size = list_parts(FS, str(tmp_path))[0].size
    compaction.compact(str(tmp_path), int(3.5 * size), {})
    assert len(list_parts(FS, str(tmp_path))) == 4


def test_compaction_of_a_shard_leaves_the_others(tmp_path: Path) -> None:
    for row in range(8):
        write(tmp_path, [row])
    compaction.compact(str(tmp_path), 1 << 20, {}, first=4, stop=8)
    assert [part.rows for part in list_parts(FS, str(tmp_path))] == [1, 1, 1, 1, 4]


CRASHING = """
import os, sys
from fsspec.implementations.local import LocalFileSystem
from pipeline.sinks import compaction
left = int(sys.argv[2])
def dying(function):
    def call(*args, **kwargs):
        global left
        if left == 0:
            os._exit(9)
        left -= 1
        return function(*args, **kwargs)
    return call
LocalFileSystem.rm_file = dying(LocalFileSystem.rm_file)
compaction.put_bytes = dying(compaction.put_bytes)
compaction._move = dying(compaction._move)
compaction.compact(sys.argv[1], 1 << 20, {})
"""


@pytest.mark.parametrize("steps", range(9))
def test_a_crash_at_any_step_of_a_swap_loses_and_doubles_nothing(tmp_path: Path, steps: int) -> None:
    for start in (0, 3, 6):
        write(tmp_path, [start, start + 1, start + 2])
    done = subprocess.run([sys.executable, "-c", CRASHING, str(tmp_path), str(steps)], check=False, timeout=60)
    assert done.returncode == (9 if steps < 8 else 0), "two writes, three removals, a move, plan and lock: eight steps"
    seen = rows_in(tmp_path)
    assert len(seen) == len(set(seen)), "a glob saw a row twice"
    compaction.recover(str(tmp_path), {})
    assert sorted(rows_in(tmp_path)) == list(range(9))


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("what", ["compact", "remove_rows", "drop_repeats"])
def test_a_shard_that_waits_for_one_that_dies_finishes_its_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, what: str
) -> None:
    """It has looked for an unfinished swap before it waited, so it must look again once it has the lock."""
    for start in (0, 3, 6):
        write(tmp_path, [start, start + 1, start + 2])
    done = subprocess.run([sys.executable, "-c", CRASHING, str(tmp_path), str(steps)], check=False, timeout=60)
    assert done.returncode == 9
    recover = compaction.recover
    monkeypatch.setattr(compaction, "recover", lambda out, options: False)
    if what == "compact":
        compaction.compact(str(tmp_path), 1 << 20, {})
    elif what == "remove_rows":
        compaction.remove_rows(str(tmp_path), "images", np.array([[20, 30]]), {})
    else:
        compaction.drop_repeats(str(tmp_path), np.array([[20, 30]]), {})
    recover(str(tmp_path), {})  # as every job does at its end; compaction may have found no parts and not asked
    assert sorted(rows_in(tmp_path)) == list(range(9))


def test_what_is_left_of_one_part_may_take_the_name_of_the_next(tmp_path: Path) -> None:
    """An orphan wrote what two parts of a later attempt hold."""
    for rows in ([0, 1], [0, 1, 2, 3], [2, 3]):
        write(tmp_path, rows)
    compaction.drop_repeats(str(tmp_path), np.array([[0, 4]]), {})
    assert sorted(rows_in(tmp_path)) == [0, 1, 2, 3]


def test_a_swap_does_not_begin_without_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for start in (0, 3, 6):
        write(tmp_path, [start, start + 1, start + 2])
    put_bytes = compaction.put_bytes

    def robbed(fs: object, path: str, data: bytes) -> None:
        put_bytes(fs, path, data)
        if "/_swap/images" in path:
            (tmp_path / "_swapping").write_text('{"holder": "another"}')

    monkeypatch.setattr(compaction, "put_bytes", robbed)
    with pytest.raises(OutputError, match="went to another job"):
        compaction.compact(str(tmp_path), 1 << 20, {})
    assert sorted(rows_in(tmp_path)) == list(range(9))
    assert "another" in (tmp_path / "_swapping").read_text(), "whose it is now"


def test_another_shard_that_starts_in_the_middle_of_a_swap_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for start in (0, 3, 6):
        write(tmp_path, [start, start + 1, start + 2])
    others: list[threading.Thread] = []
    put_bytes = compaction.put_bytes

    def disturbed(fs: object, path: str, data: bytes) -> None:
        put_bytes(fs, path, data)
        if "/_swap/images" in path:
            others.append(threading.Thread(target=compaction.recover, args=(str(tmp_path), {})))
            others[-1].start()
            others[-1].join(1.0)

    monkeypatch.setattr(compaction, "put_bytes", disturbed)
    assert compaction.compact(str(tmp_path), 1 << 20, {}) == 3
    for other in others:
        other.join(30)
    assert len(others) == 1
    assert sorted(rows_in(tmp_path)) == list(range(9))
    assert not (tmp_path / "_swapping").exists()


def test_two_shards_take_their_rows_out_of_one_part(tmp_path: Path) -> None:
    write(tmp_path, list(range(100)))
    halves = [np.array([[0, 40]]), np.array([[60, 100]])]
    shards = [
        threading.Thread(target=compaction.remove_rows, args=(str(tmp_path), "images", rows, {})) for rows in halves
    ]
    for shard in shards:
        shard.start()
    for shard in shards:
        shard.join(60)
    assert rows_in(tmp_path) == list(range(40, 60))


def test_rows_in_two_parts_are_found_and_mended(tmp_path: Path) -> None:
    write(tmp_path, [0, 1, 2, 3])
    write(tmp_path, [2, 3, 4], failed=(3,))
    ledger = read_ledger(str(tmp_path), {})
    assert ledger.twice.tolist() == [[2, 4]]
    assert compaction.drop_repeats(str(tmp_path), ledger.twice, {}) == 2
    assert sorted(rows_in(tmp_path) + rows_in(tmp_path, "failures")) == [0, 1, 2, 3, 4]
    assert rows_in(tmp_path, "failures") == []


def test_verify_names_what_is_wrong(tmp_path: Path) -> None:
    write(tmp_path, [0, 1, 2])
    write(tmp_path, [2, 4, 11])
    problems = "\n".join(verify(str(tmp_path), record(10), intervals.EMPTY, SCHEMA, {}).problems)
    assert "1 rows stand in more than one part: 2" in problems
    assert "1 rows are not in the manifest: 11" in problems
    assert "6 rows of the manifest are in neither place: 3, 5–9" in problems


def test_verify_notices_a_flipped_bit(tmp_path: Path) -> None:
    write(tmp_path, list(range(50)))
    (file,) = (tmp_path / "images").glob("*.parquet")
    content = bytearray(file.read_bytes())
    place = content.index(np.float32(1.0).tobytes())
    content[place] ^= 0x10
    file.write_bytes(content)
    (problem,) = verify(str(tmp_path), record(50), intervals.EMPTY, SCHEMA, {}).problems
    assert file.name in problem
    assert "cannot be read" in problem


@pytest.mark.parametrize("size", [0, 3, 500])
def test_a_damaged_part_with_gaps_is_named_and_can_be_made_anew(tmp_path: Path, size: int) -> None:
    write(tmp_path, [0, 1, 2])
    write(tmp_path, [4, 6, 9])
    (file,) = (tmp_path / "images").glob("part-000000000004-*.parquet")
    os.truncate(file, size)
    with pytest.raises(OutputError, match=rf"{file} cannot be read .* delete it"):
        read_ledger(str(tmp_path), {})
    damaged, missing = verify(str(tmp_path), record(5), intervals.EMPTY, SCHEMA, {}).problems
    assert f"images/{file.name}: cannot be read" in damaged
    assert missing == "2 rows of the manifest are in neither place: 3–4"
    file.unlink()
    assert pending(read_ledger(str(tmp_path), {}), 0, 10).tolist() == [[3, 10]]


def test_a_part_that_goes_while_the_ledger_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another shard compacts between the listing and the look into a part with gaps."""
    for rows in ([0, 2], [1, 5]):
        write(tmp_path, rows)

    def overtaken(fs: AbstractFileSystem, out: str) -> list[Part]:
        parts = list_parts(fs, out)
        compaction.compact(str(tmp_path), 1 << 20, {})
        return parts

    monkeypatch.setattr("pipeline.sinks.ledger.list_parts", overtaken)
    assert read_ledger(str(tmp_path), {}).images.tolist() == [[0, 3], [5, 6]]


def test_a_part_that_is_never_there(tmp_path: Path) -> None:
    write(tmp_path, [0, 2])
    (file,) = (tmp_path / "images").glob("*.parquet")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=r"a part has gone since it was listed .* another command is writing there"):
        read_ledger(str(tmp_path), {})


def test_verify_notices_another_run(tmp_path: Path) -> None:
    write(tmp_path, [0])
    other = record(1).model_copy(update={"run_id": "other"})
    assert "not that of this run" in verify(str(tmp_path), other, intervals.EMPTY, SCHEMA, {}).problems[0]


def test_a_full_disk_names_the_path(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "import fsspec; from pipeline.storage import put_bytes; from schemas.errors import OutputError\n"
        "try: put_bytes(fsspec.filesystem('file'), sys.argv[1] + '/images/part.parquet', b'x' * 100000)\n"
        "except OutputError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert str(tmp_path / "images/part.parquet") in done.stdout
    assert os.listdir(tmp_path / "images") == []
