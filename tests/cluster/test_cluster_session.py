"""The Ray that a job starts on its own machine."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
from ray._private.utils import check_version_info, get_num_cpus
from ray._raylet import AuthenticationTokenLoader

from cluster import session
from cluster.session import _start, ray_session
from pipeline.signals import interruptible
from schemas.errors import ClusterError, Interrupted

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


def without_ray() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


@pytest.mark.slow
def test_idle_workers_are_kept() -> None:
    # A session of this process leaves its settings of Ray behind, which a child must not owe this to.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=without_ray(), capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
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
    env = without_ray() | {"HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", ONE_TASK], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "token"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_cores_that_the_process_may_not_use_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert _start(None)["num_cpus"] == 1
    finally:
        os.sched_setaffinity(0, before)
    assert _start(None)["num_cpus"] == min(len(before), int(get_num_cpus()))
    assert _start(3)["num_cpus"] == 3
    monkeypatch.setattr("cluster.session.get_num_cpus", lambda: 0)  # as Ray rounds half a CPU of a container
    assert _start(None)["num_cpus"] == 1


def test_the_store_leaves_actors_their_share_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `docker run -m 4g` on a large machine, half a gigabyte in use: Ray books what the store leaves of it."""
    monkeypatch.setattr("ray._private.utils.get_system_memory", lambda: 4 << 30)
    monkeypatch.setattr("ray._private.utils.get_cgroup_mem_stats", lambda: (1 << 29, 4 << 30))
    assert _start(2)["object_store_memory"] <= 0.2 * 3.5 * (1 << 30)
    monkeypatch.setattr("ray._private.utils.get_cgroup_mem_stats", lambda: (4 << 30, 4 << 30))
    assert _start(2)["object_store_memory"] == 100 << 20  # nothing left: the least that Ray takes


def test_a_container_with_little_shared_memory_is_told_what_to_give_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Docker gives 64 MiB, and Ray puts what does not fit on the disk."""
    monkeypatch.setattr("ray._private.utils.get_system_memory", lambda: 32 << 30)
    monkeypatch.setattr("ray._private.utils.get_cgroup_mem_stats", lambda: (0, 32 << 30))
    memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory._replace(available=32 << 30))
    shared = {"free": 64 << 20}
    monkeypatch.setattr("psutil.disk_usage", lambda path: disk._replace(**shared))
    assert _start(4)["object_store_memory"] > 64 << 20
    (told,) = caplog.messages
    assert re.match(r"/dev/shm has 64 MiB free, too little for Ray's object store of 2,048 MiB", told)
    (wanted,) = re.findall(r"docker run --shm-size=(\d+)g`, .*emptyDir of `medium: Memory` at /dev/shm", told)
    shared["free"] = int(wanted) << 30
    assert 4 << 30 <= _start(4)["object_store_memory"] <= shared["free"]
    assert caplog.messages == [told], "with what was asked for there is nothing to say"


def test_a_ray_that_does_not_come_up_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives its own processes half a minute, and raises a bare Exception then."""

    def too_late(**options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("ray.init", too_late)
    with pytest.raises(ClusterError, match=r"timed out during startup.*busy, the same command may pass"), ray_session():
        pass


def test_a_token_that_is_not_where_it_is_said_to_be_is_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    AuthenticationTokenLoader.instance().reset_cache()
    with pytest.raises(ClusterError, match=r"RAY_AUTH_TOKEN_PATH=.*/none: no token.*or unset"), ray_session():
        pass


@pytest.mark.parametrize("address", [None, "127.0.0.1"])
def test_told_to_stop_while_ray_starts(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    """By Ray's handler, which is there from the first moment on, or by one of ours before."""

    def as_ray_does(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    for starting in (as_ray_does, lambda **options: signal.raise_signal(signal.SIGTERM)):
        monkeypatch.setattr("ray.init", starting)
        with pytest.raises(Interrupted) as stopped, interruptible(), ray_session(address):
            pass
        assert stopped.value.exit_code == 143


def test_an_error_without_words_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(**options: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("ray.init", silent)
    for address, message in ((None, "on this machine: TimeoutError"), ("127.0.0.1", r"127.0.0.1 \(TimeoutError\)")):
        with pytest.raises(ClusterError, match=message), ray_session(address):
            pass


def test_versions_that_differ_are_all_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray's own check, of a cluster whose Python differs from ours in its last number."""
    theirs = {"ray_version": ray.__version__, "python_version": "3.11.99"}
    monkeypatch.setattr("ray.init", lambda **_: check_version_info(theirs, "192.0.2.1"))
    with pytest.raises(ClusterError) as caught, ray_session("127.0.0.1"):
        pass
    told = str(caught.value)
    assert told.startswith("the Ray cluster at 127.0.0.1 has another Ray or Python")
    for version in (ray.__version__, "3.11.99", platform.python_version()):
        assert version in told
    assert "Use the cluster's versions here" in told
    assert "no Ray cluster answers" not in told


def test_a_start_without_an_end_is_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It hears no Ctrl-C: then at least it is said what ends it."""
    timers: list[threading.Timer] = []

    def start(**_: object) -> None:
        timers[:] = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        while session._SLOW_START_S < 1 and not caplog.records:
            time.sleep(0.01)
        raise RuntimeError("none")

    monkeypatch.setattr("ray.init", start)
    for slow_s, told in ((3600.0, []), (0.01, [f"`kill {os.getpid()}` then ends this"])):
        monkeypatch.setattr(session, "_SLOW_START_S", slow_s)
        with pytest.raises(ClusterError), ray_session(cpus=1):
            pass
        assert all(timer.finished.is_set() for timer in timers)
        assert all(words in record.message for words, record in zip(told, caplog.records, strict=True))
