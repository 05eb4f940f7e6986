"""Clusters of a run as a Ray job: the cluster's tasks read the vectors, not the machine that the job runs on."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.commands import patchstream
from support.runs import RunContent, clustered, write_run

from cluster.nodes import LocalCluster


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_kmeans_runs_on_the_cluster_that_it_is_submitted_to(
    head: LocalCluster, env: dict[str, str], tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", RunContent({"cls": clustered(3000, 16, 6, seed=3)}, parts=6))
    done = patchstream(
        "submit", "--address", head.dashboard, "--", "kmeans", run, "-k", "6", "--ray", "auto", env=env
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    table = pq.read_table(run / "clusters" / "k6")
    assert sorted(table.column("row").to_pylist()) == list(range(3000))
    assert json.loads((run / "clusters" / "k6.json").read_text())["rows"] == 3000
    assert not (run / "index").exists(), "vectors were copied by the machine that the job runs on"
    # Worker logs are named worker-ID-JOB-PID: Ray's own job looks after ours, which had workers too.
    logs = head.folder.glob("*/session_latest/logs/worker-*-*-*.out")
    jobs = {path.name.split("-")[2] for path in logs} - {"ffffffff"}
    assert len(jobs) > 1
