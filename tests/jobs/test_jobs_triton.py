"""The whole job through a real Triton server: as with torch, and when the server dies, with and without coming back."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from support.commands import attempt_records, end, patchstream, rows_in, start, table
from support.triton import LONGEST_START_S, TritonServer, server_folder, triton_server

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]

COPIES = 3
PICTURES = 64


class Job(NamedTuple):
    """A model, its repository and name on the server, and the arguments of a job but for back end and --out."""

    repository: Path
    name: str
    arguments: tuple[str, ...]
    broken: int


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Job:
    from jobs.demo.draw import write_broken, write_pictures
    from pipeline.models import inspect_model
    from pipeline.predictors.triton_repository import Serving, export_triton

    server_folder()
    folder = tmp_path_factory.mktemp("triton-job")
    (folder / "pictures").mkdir()
    write_pictures(folder / "pictures", PICTURES, seed=5)
    write_broken(folder / "pictures")
    broken = len(list((folder / "pictures").iterdir())) - PICTURES
    (name,) = export_triton(inspect_model(str(checkpoint)), str(folder / "repo"), Serving(max_batch_size=4), onnx=False)
    config = folder / "job.toml"
    text = "labels = 2\ndtype = 'float32'\nbatch_size = 4\nactors = {min = 1, max = 1}\n[sink]\ncommit_s = 0.5\n"
    config.write_text(text)
    arguments = ("embed", *[str(folder / "pictures")] * COPIES, "--model", str(checkpoint), "--config", str(config))
    return Job(folder / "repo", name, (*arguments, "--no-report"), broken)


def through(server: TritonServer) -> tuple[str, ...]:
    return ("--backend", "triton", "--triton-url", server.url)


def with_outage(job: Job, folder: Path, outage_s: float) -> tuple[str, ...]:
    """The job's arguments with another configuration file: how long rows wait for a server."""
    position = job.arguments.index("--config") + 1
    config = folder / "outage.toml"
    text = Path(job.arguments[position]).read_text()
    config.write_text(f'{text}[triton]\nurl = "-"\noutage_s = {outage_s}\n')
    return (*job.arguments[:position], str(config), *job.arguments[position + 1 :])


def wait_until(condition: Callable[[], bool], log: Path, timeout_s: float = 150) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_same_output_as_with_torch_also_when_the_server_dies_and_returns(
    job: Job, log_dir: Path, tmp_path: Path
) -> None:
    plain = patchstream(*job.arguments, "--out", tmp_path / "torch")
    assert plain.returncode == 0, plain.stderr
    out, log = tmp_path / "out", tmp_path / "log"
    with contextlib.ExitStack() as servers:
        first = servers.enter_context(triton_server(job.repository, [job.name], log_dir=log_dir))
        given = with_outage(job, tmp_path, LONGEST_START_S + 100)
        driver = start(*given, *through(first), "--out", out, log=log)
        try:
            wait_until(lambda: bool(rows_in(out)), log)
            os.killpg(first.process.pid, signal.SIGKILL)
            time.sleep(1.0)
            assert driver.poll() is None, "the job was over before the server died"
            servers.enter_context(triton_server(job.repository, [job.name], log_dir=log_dir, port=first.port))
            assert driver.wait(timeout=200) == 0, log.read_text()
        finally:
            end(driver.pid)
    assert len(rows_in(out, "failures")) == COPIES * job.broken
    assert patchstream("verify", out).returncode == 0
    ours, theirs = table(out), table(tmp_path / "torch")
    for name in ("row", "uri", "sha256", "width", "height"):
        assert ours[name].equals(theirs[name])
    for name in ("cls", "pooled"):
        apart = np.abs(np.array(ours[name].to_pylist()) - np.array(theirs[name].to_pylist()))
        assert apart.max() <= 1e-5


def test_a_server_that_never_returns_ends_the_job_with_code_3_and_retry_finishes_it(
    job: Job, log_dir: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    given = (*with_outage(job, tmp_path, 2.0), "--out", out, "--max-failure-rate", "0.2")
    with triton_server(job.repository, [job.name], log_dir=log_dir) as server:
        driver = start(*given, *through(server), log=log)
        try:
            wait_until(lambda: bool(rows_in(out)), log)
            os.killpg(server.process.pid, signal.SIGKILL)
            assert driver.wait(timeout=120) == 3, log.read_text()
        finally:
            end(driver.pid)
    assert "images failed" in log.read_text()
    assert "Traceback" not in log.read_text()
    failed = table(out, "failures").to_pydict()
    away = [row for row, error in zip(failed["row"], failed["error"], strict=True) if error == "ServerAway"]
    assert len(away) > 10
    assert {r for r, e in zip(failed["retryable"], failed["error"], strict=True) if e == "ServerAway"} == {True}
    assert sorted(rows_in(out) + failed["row"]) == list(range(COPIES * (PICTURES + job.broken)))
    early = patchstream("retry", out)
    assert early.returncode == 2
    assert "no model" in early.stderr
    # Nothing was taken out of failures/ for a server that is not there; once it is, it is asked again.
    with triton_server(job.repository, [job.name], log_dir=log_dir, port=server.port):
        again = patchstream("retry", out, "--json")
    assert again.returncode == 0, again.stderr
    assert attempt_records(out)[-1]["rows_planned"] >= len(away)
    assert len(rows_in(out)) == COPIES * PICTURES
    assert patchstream("verify", out).returncode == 0
