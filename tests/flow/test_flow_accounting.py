"""Whatever a directory holds at the start and a pass leaves behind, each row ends in exactly one place."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import attempt_records, rows_in, table

from pipeline import flow, maintenance
from pipeline.flow import Connect, run
from pipeline.sinks import ray_writer
from pipeline.sinks.parts import part_name
from pipeline.sinks.ray_writer import Committed, WriteJob, write_blocks
from schemas.attempt import StageSeconds
from schemas.errors import OutputError
from schemas.spec import JobSpec, build_spec

ROWS = 40

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    """A job of so many rows without pictures, a part for each block."""
    listed = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"uri": [f"s3://nowhere/{i}.jpg" for i in range(ROWS)]}), listed)
    return build_spec(
        {
            "sources": [str(listed)],
            "model": "null",
            "backend": "null",
            "out": str(tmp_path / "o"),
            "sink": {"part_bytes": 1, "compact_bytes": 1},
            "batch_size": 8,
        }
    )


def all_there(spec: JobSpec) -> None:
    assert sorted(rows_in(Path(spec.out))) == list(range(ROWS))
    assert maintenance.verify(spec.out, {}).problems == []


def first_part(spec: JobSpec) -> Path:
    return min((Path(spec.out) / "images").iterdir())


def begin_swap(spec: JobSpec) -> None:
    """As a command leaves it that dies while it puts the first part in the place of others."""
    part, staging = first_part(spec), Path(spec.out) / "_swap"
    (staging / "images").mkdir(parents=True)
    part.rename(staging / "images" / part.name)
    (staging / "plan.json").write_text(json.dumps({"remove": [], "add": [f"images/{part.name}"]}))


def test_a_swap_that_was_cut_short_is_finished_before_rows_are_counted(spec: JobSpec, connect: Connect) -> None:
    """Its rows are out of sight: they would be computed again."""
    run(spec, connect)
    begin_swap(spec)
    assert run(spec, connect).attempt.rows_planned == 0
    assert not (Path(spec.out) / "_swap").exists()
    all_there(spec)


def test_a_run_merges_only_parts_that_were_not_full(spec: JobSpec, connect: Connect, tmp_path: Path) -> None:
    run(spec, connect)
    parts = list((Path(spec.out) / "images").iterdir())
    for target, left in ((7, len(parts)), (9, 1)):  # FULL_FRACTION is an eighth
        sink = spec.sink.model_copy(update={"compact_bytes": target * parts[0].stat().st_size})
        other = spec.model_copy(update={"out": str(tmp_path / str(target)), "sink": sink})
        run(other, connect)
        assert len(list((Path(other.out) / "images").iterdir())) == left
        all_there(other)
    assert maintenance.compact(str(tmp_path / "7"), sink.compact_bytes, {}) == len(parts)


def test_rows_of_two_parts_end_in_one(spec: JobSpec, connect: Connect) -> None:
    """A worker of a killed driver wrote what the next attempt wrote too."""
    run(spec, connect)
    out = Path(spec.out)
    before = table(out)
    parts = sorted((out / "images").iterdir())
    orphan = pa.concat_tables([pq.read_table(part) for part in parts[:2]])
    parts[-1].unlink()
    pq.write_table(orphan, out / "images" / part_name(orphan["row"].to_numpy()))
    summary = run(spec, connect)
    assert summary.images == ROWS
    assert table(out).equals(before)
    all_there(spec)


WRITING = """
import os, signal, sys
import fsspec, pyarrow as pa
from pipeline.sinks.parts import write_part
os.replace = lambda source, target: os.kill(os.getpid(), signal.SIGKILL)
write_part(fsspec.filesystem("file"), sys.argv[1], "images", pa.table({"row": [int(sys.argv[2])]}), b"{}")
"""


def test_what_killed_writers_left_goes_with_the_next_run(spec: JobSpec, connect: Connect) -> None:
    """Unless it is so young that another shard may still be writing it."""
    run(spec, connect)
    images = Path(spec.out) / "images"
    parts = set(images.iterdir())
    for row in range(2):
        subprocess.run([sys.executable, "-c", WRITING, spec.out, str(row)], check=False, timeout=60)
    old, young = sorted(set(images.iterdir()) - parts)
    assert old.name.startswith(".part-000000000000-")
    os.utime(old, (time.time() - 7200,) * 2)
    (images / ".part-notes.tmp").touch()
    os.utime(images / ".part-notes.tmp", (0, 0))
    run(spec, connect)
    assert set(images.iterdir()) - parts == {young, images / ".part-notes.tmp"}
    all_there(spec)


def losing(times: int, lost: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write of row 0 says `times` times that it is done, but writes nothing; each time leaves a file in `lost`."""

    def lossy(job: WriteJob, *blocks: pa.Table) -> Committed:
        number = len(list(lost.iterdir()))
        if number < times and any(0 in block["row"].to_pylist() for block in blocks):
            (lost / str(number)).touch()
            return Committed(0, 0, 0, StageSeconds(), {})
        return write_blocks(job, *blocks)

    lost.mkdir()
    monkeypatch.setattr(ray_writer, "write_blocks", lossy)


def test_what_one_pass_leaves_the_next_one_does(
    tmp_path: Path, spec: JobSpec, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(1, tmp_path / "lost", monkeypatch)
    summary = run(spec, connect)
    assert (summary.images, summary.attempt.rows_planned) == (ROWS, ROWS)
    assert len(list((tmp_path / "lost").iterdir())) == 1
    all_there(spec)


def test_rows_that_no_pass_does_end_the_job(
    tmp_path: Path, spec: JobSpec, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        losing(99, tmp_path / "lost", patch)
        with pytest.raises(OutputError, match=r"\A8 rows came to no end in 3 passes \(the first is row 0\)"):
            run(spec, connect)
    assert len(list((tmp_path / "lost").iterdir())) == 3
    assert sorted(rows_in(Path(spec.out))) == list(range(8, ROWS))
    assert run(spec, connect).attempt.rows_planned == 8
    all_there(spec)


@pytest.mark.parametrize("what", ["removes", "is rewriting"])
def test_rows_that_are_out_of_sight_in_the_end(
    spec: JobSpec, connect: Connect, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Another shard's swap is waited for; parts that somebody removed are not taken for done."""
    finish = flow._finish

    def overtaken(*arguments: Any) -> None:
        finish(*arguments)
        if what == "removes":
            first_part(spec).unlink()
        else:
            begin_swap(spec)

    with monkeypatch.context() as patch:
        patch.setattr(flow, "_finish", overtaken)
        if what == "removes":
            with pytest.raises(OutputError, match=r"8 rows that were committed are gone again \(the first is row 0\)"):
                run(spec, connect)
        else:
            assert run(spec, connect).images == ROWS
    assert run(spec, connect).images == ROWS
    all_there(spec)


def test_an_attempt_says_which_versions_it_had_and_warns_of_others(
    spec: JobSpec, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(spec, connect).attempt
    assert "other versions" not in caplog.text
    file = Path(spec.out) / "run.json"
    record = json.loads(file.read_text())
    now = record["versions"]
    assert first.versions == now
    file.write_text(json.dumps({**record, "versions": {**now, "torch": "1.0.0", "pillow": "2.0.0", "ray": "3.0.0"}}))
    assert run(spec, connect).attempt.rows_planned == 0
    assert "other versions" not in caplog.text, "nothing is computed"
    first_part(spec).unlink()
    again = run(spec, connect).attempt
    assert (again.rows_planned, again.versions) == (8, now)
    assert attempt_records(Path(spec.out))[-1]["versions"] == now
    told = f"began with other versions (torch 1.0.0 → {now['torch']}, pillow 2.0.0 → {now['pillow']}): what is computed"
    assert caplog.text.count("other versions") == caplog.text.count(told) == 1
