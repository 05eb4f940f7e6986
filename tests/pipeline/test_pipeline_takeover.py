"""A job that is suspended while it freezes the inputs loses the lock: what the job that took over made stays."""

import importlib
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from support.s3 import S3Server

from pipeline import lock, opening
from pipeline.opening import Opened, open_directory, resolve_job
from pipeline.record import read_record
from pipeline.sources.manifest import read_rows
from schemas.errors import OutputError
from schemas.spec import build_spec

LISTING = "pipeline.opening.read_sources"
LEDGER = "pipeline.opening.read_ledger"
STORING = "pipeline.sources.manifest.put_bytes"


class Jobs:
    """Jobs on one folder of pictures and one output."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.url, self.options = url, options
        self.fs, self.path = fsspec.core.url_to_fs(url, **options)
        self.filled: set[str] = set()

    def fill(self, *names: str) -> None:
        self.fs.makedirs(f"{self.path}/in", exist_ok=True)
        for name in self.filled - set(names):
            self.fs.rm_file(f"{self.path}/in/{name}")
        for name in set(names) - self.filled:
            self.fs.pipe_file(f"{self.path}/in/{name}", name.encode())
        self.filled = set(names)

    def open(self, update: bool) -> Opened:
        values = {"sources": [f"{self.url}/in"], "out": f"{self.url}/out", "model": "null", "backend": "null"}
        return open_directory(resolve_job(build_spec({**values, "storage_options": self.options, "update": update})))

    def manifest(self) -> list[str]:
        """Names of the pictures, row by row."""
        record = read_record(f"{self.url}/out", self.options)
        assert record is not None
        opened = self.open(update=False)
        tables = list(read_rows(f"{self.url}/out", opened.parts, np.array([[0, 99]]), self.options))
        assert [row for table in tables for row in table["row"].to_pylist()] == list(range(record.manifest_rows))
        return [uri.rpartition("/")[2] for table in tables for uri in table["uri"].to_pylist()]

    def suspend(self, monkeypatch: pytest.MonkeyPatch, step: str, *names: str, update: bool) -> None:
        """The next job sleeps behind `step` (before it, where it stores), until another has buried its lock and frozen
        `names`; it goes on with what was there before."""
        module, _, function = step.rpartition(".")
        original = getattr(importlib.import_module(module), function)

        def suspended(*args: Any) -> Any:
            monkeypatch.setattr(step, original)
            result = None if step == STORING else original(*args)
            result = list(result) if step == LISTING else result
            self.fs.rm_file(f"{self.path}/out/_freezing")
            before = self.filled
            self.fill(*names)
            self.open(update)
            self.fill(*before)
            return original(*args) if step == STORING else result

        monkeypatch.setattr(step, suspended)


@pytest.fixture(params=["disk", "s3"])
def jobs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setattr(lock, "_BEAT_S", 1000.0)  # who is suspended does not beat
    if request.param == "disk":
        return Jobs(str(tmp_path), {})
    server: S3Server = request.getfixturevalue("s3_server")
    return Jobs(f"s3://{server.make_bucket()}", server.storage_options)


@pytest.mark.parametrize("step", [LISTING, STORING])
def test_a_start_that_was_taken_over(jobs: Jobs, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.fill("a.jpg", "b.jpg")
    jobs.suspend(monkeypatch, step, "c.jpg", "d.jpg", update=False)
    with pytest.raises(OutputError, match="went to another job"):
        jobs.open(update=False)
    assert jobs.manifest() == ["c.jpg", "d.jpg"]


@pytest.mark.parametrize("step", [LEDGER, LISTING, STORING])
def test_an_update_that_was_taken_over(jobs: Jobs, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.fill("a.jpg", "b.jpg")
    jobs.open(update=False)
    jobs.fill("a.jpg", "b.jpg", "c.jpg")
    jobs.suspend(monkeypatch, step, "a.jpg", "b.jpg", "d.jpg", update=True)
    with pytest.raises(OutputError, match="went to another job"):
        jobs.open(update=True)
    assert jobs.manifest() == ["a.jpg", "b.jpg", "d.jpg"]


@pytest.mark.parametrize("update", [False, True])
def test_a_lock_that_a_late_beat_took_back_names_no_parts_that_are_gone(
    jobs: Jobs, update: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job had it meanwhile, and removed what it did not know."""
    jobs.fill("a.jpg", "b.jpg")
    if update:
        jobs.open(update=False)
        jobs.fill("a.jpg", "b.jpg", "c.jpg")
    original, lock_file = opening.write_manifest, f"{jobs.path}/out/_freezing"

    def overtaken(*args: Any, **options: Any) -> Any:
        parts = original(*args, **options)
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(opening, "write_manifest", original)
            beat = jobs.fs.cat_file(lock_file)
            jobs.fs.rm_file(lock_file)
            jobs.fill("a.jpg", "b.jpg", "d.jpg", "e.jpg")
            jobs.open(update)
            jobs.fs.pipe_file(lock_file, beat)
        return parts

    monkeypatch.setattr(opening, "write_manifest", overtaken)
    with pytest.raises(OutputError, match=r"manifest/manifest-\S+, which this job wrote, is gone: another job"):
        jobs.open(update)
    monkeypatch.setattr(opening, "write_manifest", original)
    assert jobs.manifest() == ["a.jpg", "b.jpg", "d.jpg", "e.jpg"]
