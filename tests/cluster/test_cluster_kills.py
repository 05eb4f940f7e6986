"""A node is killed while the job runs on it, another joins: every row once, in one attempt.

`make kills-nodes` runs this many times over; here it happens once.
"""

import hashlib
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.commands import ACTOR_TITLE, attempt_records, end, patchstream, rows_in, start, table

from cluster.nodes import LocalCluster, Node, NodeSize

KILLS = int(os.environ.get("PATCHSTREAM_NODE_KILLS", "1"))
COPIES = 6
MOST_ACTORS = 3
WAIT_S = 180
WORKER = NodeSize(cpus=1, store_bytes=160 << 20)
CONFIG = """
labels = 2
dtype = "float32"
batch_size = 4
[sink]
commit_s = 0.5
"""

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, pictures: Path, checkpoint: Path) -> tuple[str, ...]:
    """The arguments of a job of a few hundred rows, all but --out."""
    config = tmp_path_factory.mktemp("config") / "job.toml"
    config.write_text(CONFIG)
    given = ("embed", *[str(pictures)] * COPIES, "--model", str(checkpoint), "--config", str(config), "--no-report")
    return (*given, "--actors", f"1:{MOST_ACTORS}")


def actors_on(node: Node) -> int:
    """How many predictors live on a node."""
    count = 0
    for process in psutil.Process(node.process.pid).children(recursive=True):
        try:
            count += ACTOR_TITLE in " ".join(process.cmdline())
        except psutil.Error:
            continue
    return count


@pytest.mark.parametrize("number", range(KILLS))
def test_a_node_dies_and_another_joins(
    tmp_path: Path, nodes: LocalCluster, pictures: Path, job: tuple[str, ...], number: int
) -> None:
    rng = random.Random(number)
    out, log = tmp_path / "out", tmp_path / "log"
    workers = nodes.alive[1:]
    assert len(workers) == 2
    driver = start(*job, "--out", out, log=log, env={**os.environ, **nodes.variables})
    try:
        wait_until(driver, log, "predictors on both nodes", lambda: min(map(actors_on, workers)) > 0)
        wait_until(driver, log, "a first part", lambda: bool(rows_in(out)))
        time.sleep(rng.uniform(0, 3))
        victim, survivor = rng.sample(workers, 2)
        victim.raylet.kill()
        assert driver.poll() is None, "the job was over before the node died"
        (joined,) = nodes.join(WORKER)
        wait_until(driver, log, "a predictor on the node that joined", lambda: actors_on(joined) > 0)
        assert actors_on(survivor) + actors_on(joined) <= MOST_ACTORS
        assert driver.wait(timeout=300) == 0, log.read_text()
    finally:
        end(driver.pid)
    assert victim.process.wait(timeout=60) != 0
    every_row_once(out, pictures)


def every_row_once(out: Path, pictures: Path) -> None:
    """Counted, verified, and held against the files: each row has the digest and the features of its own picture."""
    files = {str(path): path.read_bytes() for path in pictures.rglob("*") if path.is_file()}
    assert sorted(rows_in(out) + rows_in(out, "failures")) == list(range(COPIES * len(files)))
    verdict = patchstream("verify", out)
    assert verdict.returncode == 0, verdict.stdout
    (record,) = attempt_records(out)
    assert record["status"] == "done"
    images = table(out).to_pydict()
    assert images["sha256"] == [hashlib.sha256(files[uri]).hexdigest() for uri in images["uri"]]
    assert Counter(Counter(images["uri"]).values()) == {COPIES: 96}
    features = np.array(images["cls"])
    first = {uri: features[images["uri"].index(uri)] for uri in set(images["uri"])}
    np.testing.assert_allclose(features, np.array([first[uri] for uri in images["uri"]]), atol=1e-4)
    assert len(np.unique(np.round(np.array(list(first.values())), 3), axis=0)) > 90


def wait_until(driver: "subprocess.Popen[bytes]", log: Path, what: str, condition: Callable[[], bool]) -> None:
    """Poll until `condition()` holds while the driver is alive."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert driver.poll() is None, f"the job ended before there was {what}:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"no sign of {what} in {WAIT_S} s:\n{log.read_text()}"
        time.sleep(0.1)
