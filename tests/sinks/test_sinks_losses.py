"""What the user is told where Ray gives up on processes, nodes or room, and that an error of code stays one."""

import os
import signal
from pathlib import Path

import pytest
import ray
from support.commands import rows_in

from cluster.remote import call
from cluster.session import ray_session
from jobs.cli import run_command
from schemas.errors import ClusterError, OutputError
from schemas.losses import unwrap

KILLED = "Task was killed due to the node running low on memory.\nMemory on the node was 15.2GB / 16GB"


def of_a_task(cause: Exception) -> Exception:
    """As `ray.get` raises it: of both types, with a traceback as its message."""
    error = ray.exceptions.RayTaskError("write_blocks", "Traceback: …", cause, "ray::write", 7, "10.0.0.1")
    return error.make_dual_exception_instance()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ray.exceptions.WorkerCrashedError(), "WorkerCrashedError: The worker died unexpectedly"),
        (ray.exceptions.OutOfMemoryError(KILLED), r"OutOfMemoryError: Task was killed .* low on memory\.\)"),
        (ray.exceptions.NodeDiedError("node 10.0.0.1 is gone"), "NodeDiedError: node 10.0.0.1 is gone"),
        (ray.exceptions.RaySystemError("http://me:hush@h/x"), "RaySystemError: System error: http://h/x"),
        (ray.exceptions.ActorDiedError(), "ActorDiedError: The actor died unexpectedly"),
        (of_a_task(ray.exceptions.ObjectLostError("ab", None, "")), "ObjectLostError: Failed to retrieve object ab"),
        (of_a_task(ray.exceptions.ObjectStoreFullError("no room")), "ObjectStoreFullError: no room"),
    ],
)
def test_a_loss_is_one_message(error: Exception, said: str) -> None:
    found = unwrap(error)
    assert isinstance(found, ClusterError)
    with pytest.raises(ClusterError, match=rf"\({said}.*the same command resumes"):
        raise found
    assert len(str(found).splitlines()) == 1


def test_an_error_of_code_stays_what_it_is() -> None:
    failed = of_a_task(ValueError("unforeseen"))
    of_a_constructor = ray.exceptions.RayTaskError("init", "Traceback: …", KeyError("x"), "ray::actor", 7, "10.0.0.1")
    for error in (failed, ray.exceptions.ActorDiedError(of_a_constructor)):
        assert unwrap(error) is error
    refused = unwrap(of_a_task(OutputError("cannot write /out")))
    assert (type(refused), str(refused)) == (OutputError, "cannot write /out")


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_measures_ends_the_command_in_one_message() -> None:
    with ray_session(cpus=1):
        with pytest.raises(ClusterError, match=r"WorkerCrashedError: .*\. Nothing is lost; give the same command"):
            call(killed)
        with pytest.raises(ValueError, match="unforeseen"):
            call(unforeseen)
        with pytest.raises(OutputError, match=r"\Acannot write /out\Z"):
            call(refused)


def unforeseen() -> None:
    raise ValueError("unforeseen")


def refused() -> None:
    raise OutputError("cannot write /out")


@pytest.mark.slow
def test_a_writer_that_is_killed_each_time_ends_the_job_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    job = ["embed", str(tmp_path), "--backend", "null", "--out", str(tmp_path / "out"), "--no-report"]
    with ray_session(cpus=1):
        with monkeypatch.context() as patched:
            patched.setattr("pipeline.sinks.ray_writer.write_blocks", killed)
            assert run_command(job) == 2
        told = capsys.readouterr().err
        assert "error: Ray gave up: a worker, node or object that the job needed was lost" in told
        assert "WorkerCrashedError" in told
        assert "Traceback" not in told
        assert run_command(job) == 0
    assert rows_in(tmp_path / "out") == [0, 1]
