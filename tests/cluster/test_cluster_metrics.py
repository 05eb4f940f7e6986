"""What Prometheus and a log collector find while a job runs on a real Ray: the dashboard's names, and lines of JSON."""

import json
import os
import re
import time
import urllib.request
from pathlib import Path

import pytest
from support.commands import attempt_records, end, rows_in, start

from cluster.nodes import LocalCluster

METRICS = Path(__file__).parents[2] / "deploy/grafana/metrics.json"
SAMPLE = re.compile(r"^(ray_patchstream_\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


def scraped(cluster: LocalCluster) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Our samples from every node's metrics port, as Prometheus would read them: labels and value by name."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for file in cluster.folder.glob("*/session_latest/metrics_export_port_*"):
        with urllib.request.urlopen(f"http://127.0.0.1:{file.read_text().strip()}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        for name, labels, value in SAMPLE.findall(text):
            found.setdefault(name, []).append((dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
    return found


def test_the_names_of_the_dashboard_are_there_while_a_job_runs(
    head: LocalCluster, slow_job: tuple[str, ...], tmp_path: Path
) -> None:
    listed = {f"ray_{metric['name']}": set(metric["labels"]) for metric in json.loads(METRICS.read_text())}
    out, log = tmp_path / "out", tmp_path / "log"
    variables = {**head.variables, "RAY_metrics_report_interval_ms": "1000"}
    driver = start(*slow_job, "--out", out, log=log, env={**os.environ, **variables})
    try:
        deadline = time.monotonic() + 200
        while set(found := scraped(head)) < set(listed):
            assert driver.poll() is None, f"the job ended with {sorted(found)} alone:\n{log.read_text()}"
            assert time.monotonic() < deadline, sorted(found)
            time.sleep(0.5)
        committed = len(rows_in(out))
    finally:
        end(driver.pid)
    for name, labels in listed.items():
        for sample, value in found[name]:
            assert labels | {"SessionName", "WorkerId", "NodeAddress"} <= set(sample)
            assert value > 0
    images = sum(value for _, value in found["ray_patchstream_images_total"])
    assert 0 < images <= committed
    assert {sample["stage"] for sample, _ in found["ray_patchstream_failures_total"]} == {"decode"}
    stages = {sample["stage"] for sample, _ in found["ray_patchstream_stage_seconds_total"]}
    assert stages == {"fetch", "decode", "predict", "write"}
    assert all(value <= 1 for _, value in found["ray_patchstream_batch_fill"])
    lines_name_run_and_rows(head, out)


def lines_name_run_and_rows(head: LocalCluster, out: Path) -> None:
    """Workers wrote lines of JSON; those of a commit say which rows of which run it held."""
    run_id = json.loads((out / "run.json").read_text())["run_id"]
    files = head.folder.glob("*/session_latest/logs/worker-*.err")
    texts = [line for file in files for line in file.read_text(errors="replace").splitlines() if run_id in line]
    lines = [json.loads(text) for text in texts]
    assert {line["event"] for line in lines} >= {"ready", "committed", "decoded"}
    commits = [line for line in lines if line["event"] == "committed"]
    done = sum(line["images"] + sum(line["failures"].values()) for line in commits)
    assert done == len(rows_in(out)) + len(rows_in(out, "failures"))
    assert all(0 <= line["first_row"] <= line["last_row"] for line in commits)
    assert all(line["level"] == "info" and line["stage"] == "write" and line["host"] for line in commits)
    assert len(attempt_records(out)) == 1
