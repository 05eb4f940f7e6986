"""What a person reads at the end of a run: places as they are, whatever characters are in them and however long."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs import RunContent, write_run

from jobs.cli import run_command
from jobs.console import Screen, print_summary
from jobs.output import with_options
from jobs.run import _check_rate, run
from pipeline.flow import Summary
from pipeline.progress import Progress
from schemas.attempt import AttemptRecord
from schemas.errors import TooManyFailures
from schemas.spec import build_spec


def attempt() -> AttemptRecord:
    return AttemptRecord(
        attempt=1, shard_index=0, shard_count=1, started="2026-01-01T00:00:00+00:00", host="h", pid=1, status="done",
        command="embed", rows_planned=3, images=2, failures=1, startup_s=1.0, wall_s=4.5, images_per_s=2.0,
    )  # fmt: skip


@pytest.mark.parametrize("failures", [0, 1])
@pytest.mark.parametrize(
    "out", ["/data/photos[v2]/out", "/data/[/old]", "/data/[red]/x", "/data/:heart:", f"/{'long name/' * 20}out"]
)
def test_places_are_printed_as_they_are(capsys: pytest.CaptureFixture[str], out: str, failures: int) -> None:
    print_summary(Summary(out, 3, 3 - failures, failures, attempt()), f"{out}/report.html", f"{out}/maps")
    lines = capsys.readouterr().out.splitlines()
    told = {line[:15].rstrip(): line[16:] for line in lines[:-1]}
    assert told["images"] == f"{3 - failures} of 3"
    assert told["this attempt"] == "3 rows in 4.5 s, 2.0/s once all ran"
    assert told["dataset"] == f"{out}/images/*.parquet"
    assert told["report"] == f"{out}/report.html"
    assert told["attention maps"] == f"{out}/maps"
    assert out in lines[-1]


def test_a_dataset_is_told_as_the_store_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    """In a bucket `features//images` is another place than `features/images`."""
    print_summary(Summary("s3://my-bucket/features/", 3, 3, 0, attempt()), None, None)
    assert " s3://my-bucket/features/images/*.parquet\n" in capsys.readouterr().out


def test_a_run_of_a_moment_has_no_rate(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(Summary("o", 3, 2, 1, attempt().model_copy(update={"startup_s": 4.4})), None, None)
    assert "3 rows in 4.5 s\n" in capsys.readouterr().out


def test_rates_are_shown_once_they_are_not_those_of_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    for left_s in (None, 9.0):
        Screen().show(Progress("running", 8, 80, rate_now=0.2, rate_mean=0.2, left_s=left_s))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "8/80 (10%)  ·  0 failed"
    assert second == "8/80 (10%)  ·  0.2 images/s now, 0.2 on average  ·  0 failed  ·  9.0 s left"


def test_a_job_that_has_yet_to_begin_says_for_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    for note in ("", "", "nothing has come for 5 minutes", "nothing has come for 5 minutes"):
        screen.show(Progress("starting", note=note))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "… starting the workers"
    assert second == f"{first}  ·  nothing has come for 5 minutes"


def test_the_command_that_shows_why_all_failed_works(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = write_run(tmp_path / "it's out", RunContent({"cls": np.ones((2, 4), np.float32)}, failed={2: "Denied"}))
    for part in (out / "images").iterdir():
        part.unlink()
    for options in ({}, {"s3": {"anon": True}}):
        with pytest.raises(TooManyFailures) as told:
            _check_rate(Summary(str(out), 1, 0, 1, attempt()), 1.0, options)
        assert run_command([*shlex.split(str(told.value).partition("patchstream ")[2]), "--json"]) == 0
        (line,) = json.loads(capsys.readouterr().out)
        assert line == {"stage": "decode", "error": "Denied", "count_star()": 1}


def test_a_run_from_python_in_which_all_failed_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_run(tmp_path / "out", RunContent({"cls": np.ones((2, 4), np.float32)}, failed={2: "Denied"}))
    ends = iter([Summary(str(out), 3, 2, 1, attempt()), Summary(str(out), 3, 0, 3, attempt())])
    monkeypatch.setattr("pipeline.flow.run", lambda spec, connect: next(ends))
    spec = build_spec({"sources": ["x"], "model": "null", "backend": "null", "out": str(out)})
    assert run(spec).images == 2
    assert (out / "report.html").exists()
    with pytest.raises(TooManyFailures, match="3 of 3 images failed"):
        run(spec, report=False)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "patchstream status s3://b/run"),
        (
            {"anon": True, "key": None},
            'patchstream status s3://b/run --storage-options \'{"anon": true, "key": null}\'',
        ),
        ({"key": "hush"}, "patchstream status s3://b/run --storage-options … (as they were given:"),
        ({"endpoint_url": "http://me:hush@host"}, "patchstream status s3://b/run --storage-options … (as they"),
    ],
)
def test_a_next_command_has_the_storage_options_that_it_needs(
    capsys: pytest.CaptureFixture[str], options: dict[str, Any], shown: str
) -> None:
    assert with_options("patchstream status s3://b/run", options).startswith(shown)
    print_summary(Summary("s3://b/run", 3, 2, 1, attempt()), None, None, options)
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"next: {shown}")
    assert "hush" not in told


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """Standard output goes to a reader that has gone, as `head` does when it has its lines."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, contextlib.redirect_stdout(stream):
        yield


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize(("failures", "code"), [(1, 0), (8, 3)])
def test_a_job_whose_summary_nobody_reads_ends_with_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], failures: int, code: int
) -> None:
    summary = Summary(str(tmp_path), 10, 10 - failures, failures, attempt())
    monkeypatch.setattr("pipeline.flow.run", lambda *arguments: summary)
    arguments = ["embed", "in", "--backend", "null", "--out", str(tmp_path), "--no-report", *options]
    with unread():
        assert run_command([*arguments, "--max-failure-rate", "0.1"]) == code


def test_a_command_whose_answer_nobody_reads_ends_with_its_own_code(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", RunContent({"cls": np.ones((2, 4), np.float32)}))
    next((out / "images").iterdir()).write_bytes(b"")
    with unread():
        assert run_command(["status", str(out)]) == 0
    with unread():
        assert run_command(["verify", str(out)]) == 1
