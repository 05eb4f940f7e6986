"""The start commands of cluster/local.yaml, run for real on this machine: who may come in, and where it listens."""

import contextlib
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import yaml
from support.ports import LOOPBACK, free_port, tried_again
from support.processes import running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
TOKEN = "a" * 64


class Head(NamedTuple):
    """A head node that runs: ports, its processes, and the folder that its sessions are in."""

    port: int
    dashboard_port: int
    pid: int
    folder: Path


def command(side: str, replaced: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Arguments and variables of a `ray start` line, with the values of some options replaced or (empty) left out."""
    config = yaml.safe_load((ROOT / "cluster/local.yaml").read_text())
    (line,) = [text for text in config[f"{side}_start_ray_commands"] if "ray start" in text]
    words = shlex.split(line.partition(";")[2])
    variables = dict(word.split("=", 1) for word in words if re.match(r"^[A-Z_]+=", word))
    options = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
    options |= replaced
    arguments = [f"{key}={value}" if value else key for key, value in options.items() if value != "-"]
    return [str(RAY), "start", *arguments], variables


def environment(folder: Path, token: str | None, variables: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    known = {"HOME": str(folder), "PATH": os.defpath}
    variables = {name: string.Template(value).substitute(known) for name, value in variables.items()}
    extra = {**known, "RAY_USAGE_STATS_ENABLED": "0", **variables}
    return {**kept, **extra, **({"RAY_AUTH_TOKEN": token} if token else {})}


@pytest.fixture(scope="module")
def head(log_dir: Path) -> Iterator[Head]:
    # Ray puts sockets below this folder, whose paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ps-", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "patchstream").symlink_to(RAY.parents[1])
        yield tried_again(lambda: stack.enter_context(started(folder, log_dir)))


@contextlib.contextmanager
def started(folder: Path, log_dir: Path) -> Iterator[Head]:
    port, dashboard_port = free_port(), free_port()
    arguments, variables = command(
        "head",
        {
            "--port": str(port), "--dashboard-port": str(dashboard_port), "--metrics-export-port": str(free_port()),
            "--dashboard-agent-listen-port": str(free_port()), "--object-spilling-directory": str(folder / "spill"),
            "--autoscaling-config": "-", "--temp-dir": str(folder / "ray"), "--block": "", "--num-cpus": "0",
            "--object-store-memory": "100000000", "--include-log-monitor": "false", "--node-ip-address": LOOPBACK,
        },
    )  # fmt: skip
    with running(
        arguments,
        name="ray-head",
        log_dir=log_dir,
        ready=lambda process: answers(dashboard_port, TOKEN) == 200,
        timeout_s=120,
        grace_s=3,
        env=environment(folder, TOKEN, variables),
        cwd=folder,
    ) as process:
        yield Head(port, dashboard_port, process.pid, folder)


def asked(port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the dashboard answers to one with the token."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{LOOPBACK}:{port}/api/jobs/{path}", data, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return dict(json.load(response))


def answers(port: int, token: str | None) -> int | None:
    """HTTP status of the dashboard's job list; None if nobody listens."""
    request = urllib.request.Request(f"http://{LOOPBACK}:{port}/api/jobs/")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, OSError):
        return None


def test_a_job_runs_the_python_that_is_named_there(head: Head) -> None:
    job = asked(head.dashboard_port, "", {"entrypoint": "command -v python"})["submission_id"]
    deadline = time.monotonic() + 120
    while asked(head.dashboard_port, job)["status"] in {"PENDING", "RUNNING"}:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    said = asked(head.dashboard_port, f"{job}/logs")["logs"].splitlines()
    assert f"{head.folder}/patchstream/bin/python" in said


def test_the_dashboard_wants_the_token(head: Head) -> None:
    assert answers(head.dashboard_port, TOKEN) == 200
    assert answers(head.dashboard_port, None) == 401
    assert answers(head.dashboard_port, "b" * 64) in (401, 403)


def test_the_dashboard_listens_on_the_head_alone(head: Head) -> None:
    listening = {  # of all processes: one of the head's may end while it is asked
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == head.dashboard_port
    }
    assert listening == {LOOPBACK}


def test_a_worker_with_another_token_does_not_join(head: Head) -> None:
    arguments, variables = command("worker", {"--address": f"{LOOPBACK}:{head.port}", "--block": ""})
    arguments = [argument for argument in arguments if not argument.startswith("--metrics")]
    started = time.monotonic()
    done = subprocess.run(
        arguments,
        env=environment(head.folder, "b" * 64, variables),
        capture_output=True, text=True, timeout=120, check=False, cwd=head.folder,
    )  # fmt: skip
    assert done.returncode != 0
    assert time.monotonic() - started < 100
    assert "InvalidAuthToken" in done.stdout + done.stderr
