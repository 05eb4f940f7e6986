"""A cluster that has yet to grow: the job waits for its machines, for as long as it was told to."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.nodes import NodeSize, local_cluster

PROGRAM = """
import sys
from cluster.session import ray_session
with ray_session(bundles=[{"GPU": 1.0, "CPU": 1.0}], wait_s=float(sys.argv[1])) as machines:
    print("waiting is over", machines.gpus, machines.nodes, list(map(bool, machines.node_cpu_flags)), flush=True)
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_node_that_comes_later_is_waited_for(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    where = {"PYTHONPATH": str(root)}
    with local_cluster((), head=NodeSize(cpus=0, store_bytes=100 << 20), environment=where) as cluster:
        env = {**os.environ, **cluster.variables}
        started = time.monotonic()
        early = subprocess.run(
            [sys.executable, "-c", PROGRAM, "2"],
            cwd=root,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert "waiting is over 0.0 1 []" in early.stdout
        assert time.monotonic() - started > 2
        with (tmp_path / "log").open("wb") as log:
            waiting = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, "150"], cwd=root, env=env, stdout=log, stderr=log
            )
        try:
            time.sleep(1.0)
            assert waiting.poll() is None
            cluster.join(NodeSize(cpus=1, gpus=1, store_bytes=100 << 20))
            assert waiting.wait(timeout=100) == 0, (tmp_path / "log").read_text()
        finally:
            waiting.kill()
            waiting.wait()
        assert "waiting is over 1.0 2 [True]" in (tmp_path / "log").read_text()


ASKED_AGAIN = """
import threading, time
import ray
from ray.autoscaler.sdk import request_resources
from ray.experimental.internal_kv import _internal_kv_get
from cluster import session

session._ASK_AGAIN_S = 0.5

def until(wanted):
    while not ray.is_initialized() or (_internal_kv_get("autoscaler_resource_request") or b"").decode() != wanted:
        time.sleep(0.05)

def another_job():
    until('[{"GPU": 1.0}]')
    request_resources(bundles=[])  # its machines have come
    print("taken back", flush=True)
    until('[{"GPU": 1.0}]')
    print("asked again", flush=True)
    come = session.machines()._replace(gpus=1.0)
    session.machines = lambda flags={}: come

threading.Thread(target=another_job, daemon=True).start()
with session.ray_session(bundles=[{"GPU": 1.0}], wait_s=60.0):
    assert _internal_kv_get("autoscaler_resource_request") == b"[]"
"""


@pytest.mark.slow
def test_a_request_that_another_job_took_back_is_made_again() -> None:
    root = Path(__file__).parents[2]
    where = {"PYTHONPATH": str(root)}
    with local_cluster((), head=NodeSize(cpus=0, store_bytes=100 << 20), environment=where) as cluster:
        done = subprocess.run(
            [sys.executable, "-c", ASKED_AGAIN], cwd=root, env={**os.environ, **cluster.variables},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "taken back\nasked again\n"), done.stderr
