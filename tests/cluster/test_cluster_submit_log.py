"""A Ray job whose log cannot be had: through what lets no websocket pass, its end is told all the same."""

import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
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
