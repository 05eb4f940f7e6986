"""A Ray job behind what lets only some of its questions pass: its end is told all the same."""

import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.commands import end
from support.relay import relay

from cluster.nodes import LocalCluster

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
FOLLOW = """
import sys
import cluster.submission as submission
submission._LOST_S = 3.0
jobs = submission.Jobs(sys.argv[1])
job = jobs.submit(sys.argv[2:])
print("exit code", jobs.follow(job, lambda text: print(text, end=""), print).exit_code)
"""


def test_a_job_whose_log_does_not_come_ends_with_its_exit_code(
    head: LocalCluster, env: dict[str, str], tmp_path: Path
) -> None:
    dashboard = urlsplit(head.dashboard)
    assert dashboard.hostname
    assert dashboard.port
    job = ("embed", str(tmp_path / "nothing"), "--backend", "null", "--out", str(tmp_path / "out"))
    with relay(dashboard.hostname, dashboard.port, refused=b"/logs/tail") as between:
        command = [sys.executable, "-c", FOLLOW, f"http://127.0.0.1:{between.port}", *job]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "exit code 2"
    assert done.stdout.count("does not come (") == 1, done.stdout
    assert done.stdout.count("the rest of the log of raysubmit_") == 1
    assert "no such file" not in done.stdout


STOP = """
import sys
from cluster.submission import Jobs
jobs = Jobs(sys.argv[1])
print("exit code", jobs.stop(jobs.submit(sys.argv[2:])).exit_code)
"""


def test_a_job_is_stopped_though_the_dashboard_does_not_answer_at_once(
    head: LocalCluster, env: dict[str, str], slow_job: tuple[str, ...], tmp_path: Path
) -> None:
    dashboard = urlsplit(head.dashboard)
    assert dashboard.hostname
    assert dashboard.port
    job = (*slow_job, "--out", str(tmp_path / "out"))
    with relay(dashboard.hostname, dashboard.port, refused=b"GET /api/jobs/raysubmit") as between:
        command = [sys.executable, "-c", STOP, f"http://127.0.0.1:{between.port}", *job]
        stopping = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            while not between.refusals and stopping.poll() is None:
                time.sleep(0.1)
            between.refused = b""
            shown, _ = stopping.communicate(timeout=200)
        finally:
            end(stopping.pid)
    assert between.refusals
    assert shown.splitlines()[-1] == "exit code 143", shown
