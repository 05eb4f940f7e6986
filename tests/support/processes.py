"""Child processes of the tests: each in its own session, waited for, always ended, its output kept in a file."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.child import READY

TESTS = Path(__file__).resolve().parents[1]
_POLL_S = 0.02


@dataclass(frozen=True)
class Process:
    """A running child and the file that its standard output and error go to."""

    name: str
    popen: "subprocess.Popen[bytes]"
    log_path: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def log(self, start: int = 0) -> str:
        """What it wrote so far, from byte `start` on."""
        with self.log_path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")

    def has_ended(self) -> bool:
        """Whether the process itself is over. It is not reaped, so its process group cannot be another's yet."""
        if self.popen.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


# What runs now, so that the report of a failed test can show the logs (see tests/conftest.py).
RUNNING: list[Process] = []


@contextlib.contextmanager
def running(
    arguments: Sequence[str | Path],
    *,
    name: str,
    log_dir: Path,
    ready: Callable[[Process], bool] = lambda process: True,
    timeout_s: float = 30.0,
    grace_s: float = 5.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[Process]:
    """Run a program until the block ends; enter the block once `ready` says so.

    Its standard input stays open and empty for as long as the block lasts. At the end the whole process group gets
    SIGTERM, and SIGKILL after `grace_s`. Raises RuntimeError with the log if it ends or is not ready in time.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    log_path = log_dir / f"{name}-{os.getpid()}-{time.monotonic_ns()}.log"
    with log_path.open("wb") as log:
        popen = subprocess.Popen(
            [str(argument) for argument in arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(os.environ if env is None else env),
            cwd=cwd,
            start_new_session=True,
        )
    process = Process(name, popen, log_path)
    RUNNING.append(process)
    try:
        _wait_until_ready(process, ready, timeout_s)
        yield process
    finally:
        RUNNING.remove(process)
        _end(process, grace_s)


def _wait_until_ready(process: Process, ready: Callable[[Process], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready(process):
        if process.has_ended():
            raise RuntimeError(f"{process.name} ended before it was ready:\n{process.log()}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{process.name} was not ready within {timeout_s:g} s:\n{process.log()}")
        time.sleep(_POLL_S)


def _end(process: Process, grace_s: float) -> None:
    _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while not process.has_ended() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    _signal_group(process, signal.SIGKILL)  # also what the leader left behind
    if process.popen.stdin is not None:
        process.popen.stdin.close()
    process.popen.wait()


def _signal_group(process: Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def serving(module: str, *arguments: str, log_dir: Path, timeout_s: float = 30.0) -> Iterator[str]:
    """Run one of the servers of this folder; gives the URL that it announced.

    It gets a small environment of its own, so that neither credentials nor proxies of the user reach it.
    """
    env = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    env["PYTHONPATH"] = str(TESTS)
    with running(
        [sys.executable, "-m", module, *arguments],
        name=module.rpartition(".")[2],
        log_dir=log_dir,
        ready=lambda process: bool(_announced(process)),
        timeout_s=timeout_s,
        env=env,
        cwd=log_dir,
    ) as process:
        yield _announced(process)


def _announced(process: Process) -> str:
    lines = (line for line in process.log().splitlines(keepends=True) if line.startswith(READY))
    line = next(lines, "")
    return line.removeprefix(READY).strip() if line.endswith("\n") else ""
