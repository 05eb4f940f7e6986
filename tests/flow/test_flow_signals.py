"""Told to stop: what is held is written, the directory resumes, and it does not take long."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import attempt_records, end, patchstream, rows_in, start, workers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_stopped_and_resumed(tmp_path: Path, pictures: Path, checkpoint: Path, number: int, code: int) -> None:
    config = tmp_path / "job.toml"
    # Nothing is committed by the clock or by size here: what is on disk in the end was written because of the signal.
    config.write_text("dtype = 'float32'\nbatch_size = 4\n[sink]\ncommit_s = 60\n")
    out, log = tmp_path / "out", tmp_path / "log"
    job = ("embed", *[str(pictures)] * 2, "--model", checkpoint, "--config", config, "--no-report", "--out", out)
    driver = start(*job, log=log)
    try:
        deadline = time.monotonic() + 200
        while " failed" not in log.read_text():  # the first line with counts
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the job did not come to its first batch"
            time.sleep(0.1)
        driver.send_signal(number)
        assert driver.wait(timeout=90) == code
    finally:
        end(driver.pid)
    assert "interrupted; what was committed stays" in log.read_text()
    assert "Traceback" not in log.read_text()
    (record,) = attempt_records(out)
    assert record["status"] == "interrupted"
    kept = len(rows_in(out)) + len(rows_in(out, "failures"))
    assert 0 < kept < record["rows_planned"]
    assert record["images"] + record["failures"] == kept, "what the signal made it write is told as well"
    assert record["stage_seconds"]["predict"] > 0
    again = patchstream(*job)
    assert again.returncode == 0, again.stderr
    assert attempt_records(out)[-1]["rows_planned"] == record["rows_planned"] - kept
    assert patchstream("verify", out).returncode == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_stopped_while_ray_starts(tmp_path: Path, pictures: Path, checkpoint: Path, number: int, code: int) -> None:
    """Ray's own handler is in force by then, and would end the job as failed, with the number of the signal."""
    out, log = tmp_path / "out", tmp_path / "log"
    driver = start("embed", pictures, "--model", checkpoint, "--no-report", "--out", out, log=log)
    try:
        deadline = time.monotonic() + 200
        while not workers(driver.pid, "gcs_server"):
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "Ray was not started"
            time.sleep(0.02)
        driver.send_signal(number)
        assert driver.wait(timeout=60) == code, log.read_text()
    finally:
        end(driver.pid)
    assert "interrupted; what was committed stays" in log.read_text()
    assert "Traceback" not in log.read_text()
    (record,) = attempt_records(out)
    assert (record["status"], record["message"]) == ("interrupted", None)


TOLD_TO_STOP = """
import os, signal, sys, time
from cluster.session import ray_session
from pipeline.signals import interruptible
from schemas.errors import Interrupted
try:
    with interruptible():
        with ray_session(cpus=1):
            if sys.argv[1] == "inside":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
except Interrupted as stopped:
    print("stopped", stopped.exit_code)
"""


@pytest.mark.parametrize("when", ["inside", "behind"])
def test_ray_does_not_answer_the_signal_itself(when: str) -> None:
    """Its own handler ends the process at once, as failed, also long after Ray has been left."""
    done = subprocess.run(
        [sys.executable, "-c", TOLD_TO_STOP, when], capture_output=True, text=True, timeout=120, check=False
    )
    assert "stopped 143" in done.stdout, done.stderr


DYING = """
import os, sys
from contextlib import contextmanager
from cluster.session import ray_session
from pipeline.flow import run
from schemas.spec import build_spec

@contextmanager
def dying():
    with ray_session(cpus=2) as machines:
        try:
            yield machines
        finally:
            os._exit(9)

run(build_spec({"sources": [sys.argv[1]], "model": sys.argv[2], "out": sys.argv[3]}), dying)
"""


def test_a_process_that_dies_as_ray_ends_has_told_what_it_did(tmp_path: Path, pictures: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", DYING, pictures, checkpoint, out], capture_output=True, timeout=200, check=False
    )
    assert done.returncode == 9, done.stderr
    (record,) = attempt_records(out)
    assert record["images"] + record["failures"] == len(rows_in(out)) + len(rows_in(out, "failures")) > 0
    assert record["ended"] is None
