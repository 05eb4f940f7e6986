"""`retry` looks for its machines first, and runs in the session that it found them in."""

from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
import ray
from support.ports import LOOPBACK, free_port

from jobs.cli import run_command
from pipeline.maintenance import status
from pipeline.opening import open_directory, resolve_job
from pipeline.sinks.parts import write_part
from schemas.spec import build_spec
from schemas.tables import FAILURES_SCHEMA


@pytest.fixture
def out(tmp_path: Path) -> str:
    """A run without a model whose one row failed."""
    (tmp_path / "list.csv").write_text("uri\nhttp://nowhere/a.jpg\n")
    values = {"sources": [str(tmp_path / "list.csv")], "out": str(tmp_path / "out"), "model": "null", "backend": "null"}
    opened = open_directory(resolve_job(build_spec(values)))
    row = {"row": 0, "uri": "a", "stage": "fetch", "error": "TimedOut", "message": "", "attempts": 4, "retryable": True}
    table = pa.Table.from_pylist([row], FAILURES_SCHEMA)
    write_part(fsspec.filesystem("file"), values["out"], "failures", table, opened.record.part_metadata())
    return str(values["out"])


def test_a_cluster_that_does_not_answer_leaves_the_failures_where_they_are(
    out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["retry", out, "--address", f"{LOOPBACK}:{free_port()}"]) == 2
    assert "no Ray cluster answers" in capsys.readouterr().err
    found = status(out, {})
    assert (found["failures"], found["pending"], found["attempts"]) == (1, 0, [])


@pytest.mark.slow
def test_the_run_goes_on_in_the_session_that_was_begun(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    init = ray.init
    begun: list[Any] = []
    open_in_the_end: list[bool] = []
    monkeypatch.setattr(ray, "init", lambda **options: begun.append(options) or init(**options))
    monkeypatch.setattr("pipeline.report.write_report", lambda *_, **__: open_in_the_end.append(ray.is_initialized()))
    assert run_command(["retry", out]) == 0
    assert (len(begun), open_in_the_end) == (1, [False]), "as after any other run"
    found = status(out, {})
    assert (found["images"], found["failures"]) == (1, 0)
    tried = [(attempt["command"], attempt["status"]) for attempt in found["attempts"]]
    assert tried == [("retry", "done"), ("embed", "done")]
