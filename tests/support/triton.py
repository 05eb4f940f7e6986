"""A real Triton server, from the wheel that carries its binary (with the Python back end alone).

The wheel is unpacked once into `.make/triton-…`; the back end's stub runs in the virtual environment of the tests,
which it finds by the `python3` that comes first in PATH.
"""

import contextlib
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from support.outside import as_the_user
from support.ports import LOOPBACK, free_port
from support.processes import Process, running

WHEEL = "nvidia-pytriton==0.7.0"
_CACHE = Path(__file__).resolve().parents[2] / ".make"
_INSTALL_S = 240  # below the time that a test has
_STARTS = 3
_START_S = 90.0
_GRACE_S = 10.0
# What a test must be patient for whose job waits while a server is started: each try but the last may hang.
LONGEST_START_S = _STARTS * (_START_S + _GRACE_S)
# A port that somebody took in between; a Python back end that hangs before its first line, once in many starts.
_ANOTHER_TRY = ("address already in use", "failed to start grpc", "was not ready within")


class TritonServer(NamedTuple):
    """A running server."""

    url: str
    port: int
    process: Process


def server_folder() -> Path:
    """The unpacked wheel. Skips the test where the wheel or the Python library cannot be had."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the Triton wheel is for Linux on x86-64")
    library = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    if not any((folder / library).exists() for folder in _library_folders()):
        pytest.skip(f"no {library}, which Triton's Python back end is linked with")
    folder = _CACHE / WHEEL.replace("==", "-")
    _CACHE.mkdir(exist_ok=True)
    with (_CACHE / "triton.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _unpack(folder)
    return folder


def _library_folders() -> list[Path]:
    """Where the shared library of this Python may be: its own prefix, or the system's."""
    return [Path(str(sysconfig.get_config_var("LIBDIR"))), Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64")]


def _unpack(folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial), WHEEL]
    try:
        done = subprocess.run(
            command, env=as_the_user(), capture_output=True, text=True, timeout=_INSTALL_S, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip did not install {WHEEL} within {_INSTALL_S} s")
    if done.returncode:
        pytest.skip(f"pip cannot install {WHEEL}: {done.stderr.strip().splitlines()[-1:]}")
    root = partial / "pytriton/tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(root / f"python_backend_stubs/{version}/triton_python_backend_stub", root / "backends/python")
    for program in (root / "bin/tritonserver", root / "backends/python/triton_python_backend_stub"):
        program.chmod(0o755)
    partial.rename(folder)


@contextlib.contextmanager
def triton_server(
    repository: Path, models: Sequence[str], *, log_dir: Path, port: int | None = None, options: Sequence[str] = ()
) -> Iterator[TritonServer]:
    """Serve `models` of a repository on a free port, or on `port`, until the block ends; ready when it is entered."""
    folder = server_folder()
    with contextlib.ExitStack() as stack:
        for attempt in range(_STARTS):
            chosen = port or free_port()
            # A server that was killed leaves what it shared with its stubs.
            stack.callback(_remove_shared_memory, chosen)
            try:
                process = stack.enter_context(
                    running(
                        _command(folder, repository, models, chosen, options),
                        name="triton",
                        log_dir=log_dir,
                        ready=lambda process: "Started GRPCInferenceService" in process.log(),
                        timeout_s=_START_S,
                        grace_s=_GRACE_S,
                        env=_environment(folder),
                        cwd=repository,
                    )
                )
                break
            except RuntimeError as error:
                if attempt == _STARTS - 1 or not any(words in str(error).lower() for words in _ANOTHER_TRY):
                    raise
        yield TritonServer(f"grpc://{LOOPBACK}:{chosen}", chosen, process)


def _remove_shared_memory(port: int) -> None:
    for path in Path("/dev/shm").glob(f"{_shared_memory_prefix(port)}*"):
        path.unlink(missing_ok=True)


def _shared_memory_prefix(port: int) -> str:
    return f"patchstream-test-{os.getpid()}-{port}-"


def _command(
    folder: Path, repository: Path, models: Sequence[str], port: int, options: Sequence[str]
) -> list[str | Path]:
    return [
        folder / "pytriton/tritonserver/bin/tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={folder / 'pytriton/tritonserver/backends'}",
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in models),
        f"--grpc-address={LOOPBACK}",
        f"--grpc-port={port}",
        "--allow-http=false",
        "--allow-metrics=false",
        f"--backend-config=python,shm-region-prefix-name={_shared_memory_prefix(port)}",
        *options,
    ]


def _environment(folder: Path) -> dict[str, str]:
    libraries = [folder / "nvidia_pytriton.libs", *_library_folders()[:1]]
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "OMP_NUM_THREADS": "1",
    }
