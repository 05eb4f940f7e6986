"""A run on an S3 endpoint: read, searched, indexed, clustered and queried there."""

import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from support.runs import RunContent, clustered, write_run
from support.s3 import S3Server

from jobs import retrieve, retrieve_groups, retrieve_labels

pytestmark = pytest.mark.slow


def test_every_command_on_s3(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = RunContent(
        {"cls": clustered(600, 16, 4, spread=0.2)}, user={"kind": [f"k{row % 2}" for row in range(600)]}, parts=3
    )
    local = write_run(tmp_path / "run", content)
    fs = fsspec.filesystem("s3", **s3_server.storage_options)
    bucket = s3_server.make_bucket()
    fs.put(str(local), f"{bucket}/run", recursive=True)
    url, options = f"s3://{bucket}/run", json.dumps(s3_server.storage_options)

    app = typer.Typer()
    for module in (retrieve, retrieve_groups, retrieve_labels):
        for name, function in module.COMMANDS.items():
            app.command(name)(function)

    def run(command: str, directory: str, *arguments: str) -> Any:
        app([command, directory, *arguments, "--storage-options", options, "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    exact = run("search", url, "--row", "3", "-k", "5")
    assert exact == run("search", str(local), "--row", "3", "-k", "5")
    run("index", url, "--kind", "ivf-flat")
    by_index = run("search", url, "--row", "3", "-k", "5", "--index", "main")
    assert [hit["row"] for hit in by_index] == [hit["row"] for hit in exact]
    run("kmeans", url, "-k", "4")
    with fs.open(f"{bucket}/run/clusters/k4/clusters.parquet") as file:
        assert pq.read_table(file).num_rows == 600
    run("duplicates", url, "--threshold", "0.999")
    run("probe", url, "--label-column", "kind")
    run("apply", url, "--probe", "main", "--out", f"s3://{bucket}/labelled")
    assert run("sql", f"s3://{bucket}/labelled", "SELECT count(labels) AS n FROM images") == [{"n": 600}]
    sizes = run("sql", url, "SELECT count(*) AS n FROM clusters_k4 GROUP BY cluster")
    assert sum(item["n"] for item in sizes) == 600
    assert len(run("sql", url, "SELECT * FROM nearest(3, 5)")) == 5
    assert np.load(fs.open(f"{bucket}/run/clusters/k4.centres.npy")).shape == (4, 16)
