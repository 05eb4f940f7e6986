"""The Ray that a job starts on its own machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.session import ray_session
from schemas.errors import ClusterError

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, os, psutil, ray, time
from cluster.session import ray_session

@ray.remote(num_cpus=0)
def process(seconds):
    time.sleep(seconds)
    return os.getpid()

with ray_session(cpus=1):
    pids, seconds = set(), 2.0
    while len(pids) < 2:  # on a busy machine one worker may do all before the second is there
        pids |= set(ray.get([process.remote(seconds) for _ in range(4)]))
        seconds *= 2
    # Ray looks for idle workers every 0.2 s, and by itself ends those above one for each core after 1 s.
    time.sleep(4)
    alive = {pid for pid in pids if psutil.pid_exists(pid)}
print(json.dumps([len(pids), len(alive)]))
"""


@pytest.mark.slow
def test_idle_workers_are_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    started, alive = json.loads(done.stdout)
    assert started > 1
    assert alive == started


ONE_TASK = """
import os, ray
from cluster.session import ray_session
from cluster.submission import Jobs
from schemas.errors import ClusterError

@ray.remote
def token():
    return os.environ["RAY_AUTH_TOKEN"]

with ray_session(cpus=1):
    assert ray.get(token.remote()) == os.environ["RAY_AUTH_TOKEN"]
    print(os.environ["RAY_AUTH_MODE"])
assert "RAY_AUTH_TOKEN" not in os.environ, "a cluster that this process turns to next has a token of its own"
try:
    Jobs("http://127.0.0.1:1")
except ClusterError as error:
    assert "no Ray dashboard answers" in str(error), f"or has none at all: {error}"
with ray_session(cpus=1):
    ray.get(token.remote())
"""


@pytest.mark.slow
def test_a_home_that_cannot_be_written_to_is_no_hindrance(tmp_path: Path) -> None:
    """As in a container with a read-only root file system. A file stands in its place, which holds for root too."""
    home = tmp_path / "home"
    home.touch()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", ONE_TASK], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "token"


def test_a_ray_that_does_not_come_up_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives its own processes half a minute, and raises a bare Exception then."""

    def too_late(**options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("ray.init", too_late)
    with pytest.raises(ClusterError, match=r"timed out during startup.*busy, the same command may pass"), ray_session():
        pass
