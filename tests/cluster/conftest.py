"""A Ray of several nodes on this machine, and a job that lasts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.nodes import LocalCluster, NodeSize, local_cluster

ROOT = Path(__file__).parents[2]
STORE_BYTES = 160 << 20
WORKER = NodeSize(cpus=1, store_bytes=STORE_BYTES)


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalCluster]:
    """A head without a CPU and two nodes of one CPU each."""
    with local_cluster((WORKER, WORKER), head=NodeSize(cpus=0, store_bytes=STORE_BYTES)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def credential() -> str:
    """What no log and no record may hold."""
    return "wJalrXUtnFEMI/K7MDENG/EXAMPLEKEY"


@pytest.fixture(scope="module")
def head(credential: str) -> Iterator[LocalCluster]:
    """A head with its dashboard and a node of two CPUs, where the package is installed and SOME_SECRET is set.

    One for each file of tests: its metrics count what ran on it before.
    """
    size = NodeSize(cpus=2, store_bytes=STORE_BYTES)
    where = {"PYTHONPATH": str(ROOT), "SOME_SECRET": credential, "RAY_metrics_report_interval_ms": "1000"}
    with local_cluster((size,), head=NodeSize(cpus=0, store_bytes=STORE_BYTES), environment=where) as cluster:
        yield cluster


@pytest.fixture
def env(head: LocalCluster) -> dict[str, str]:
    """The environment of whoever submits to `head`: the token, and no address."""
    return {**os.environ, **{name: value for name, value in head.variables.items() if name != "RAY_ADDRESS"}}


@pytest.fixture(scope="session")
def slow_job(tmp_path_factory: pytest.TempPathFactory, pictures: Path, checkpoint: Path) -> tuple[str, ...]:
    """The arguments of a job of 800 rows that commits every second, all but --out."""
    config = tmp_path_factory.mktemp("config") / "job.toml"
    config.write_text("dtype = 'float32'\nbatch_size = 4\n[sink]\ncommit_s = 1\n")
    return ("embed", *[str(pictures)] * 8, "--model", str(checkpoint), "--config", str(config), "--no-report")
