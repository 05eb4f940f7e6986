"""The dashboard asks only for metrics that exist: ours, by the list beside it, and Ray's, by the installed Ray."""

import json
import re
from collections import Counter
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy/grafana"
METRIC = re.compile(r"\b(ray_[a-z0-9_]+)\b")
SELECTOR = re.compile(r"(ray_[a-z0-9_]+)\{([^}]*)\}")
GROUPED = re.compile(r"\bby \(([^)]*)\)")
# What Ray puts on every metric, and on those of a GPU or of the object store.
RAY_LABELS = {"SessionName", "NodeAddress", "WorkerId", "Component", "Version"}
SPECIAL_LABELS = {
    "ray_node_gpus_utilization": {"GpuIndex"},
    "ray_node_gram_used": {"GpuIndex"},
    "ray_object_store_memory": {"Location"},
}


def dashboard() -> dict[str, Any]:
    return dict(json.loads((GRAFANA / "patchstream.json").read_text()))


def our_metrics() -> dict[str, dict[str, Any]]:
    """By the name that Prometheus has: Ray puts its own prefix before a user's metric."""
    return {f"ray_{metric['name']}": metric for metric in json.loads((GRAFANA / "metrics.json").read_text())}


def rays_folder() -> Path:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@cache
def rays_metrics() -> frozenset[str]:
    """Names in Ray's own dashboards, read as text: importing the reporter would start half of Ray."""
    folder = rays_folder() / "dashboard/modules/metrics/dashboards"
    return frozenset(name for path in folder.glob("*.py") for name in METRIC.findall(path.read_text()))


def expressions(board: dict[str, Any]) -> list[str]:
    queries = [variable["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    return queries + [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def unknown_metrics(board: dict[str, Any]) -> set[str]:
    known = set(our_metrics()) | rays_metrics()
    return {name for text in expressions(board) for name in METRIC.findall(text)} - known


def unknown_labels(board: dict[str, Any]) -> set[str]:
    """Labels in matchers, groupings and legends that none of the panel's metrics carries."""
    unknown = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            names = set(METRIC.findall(target["expr"]))
            known = set(RAY_LABELS).union(*(labels_of(name) for name in names))
            asked = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            for group in GROUPED.findall(target["expr"]):
                asked |= {label.strip() for label in group.split(",")}
            for name, matchers in SELECTOR.findall(target["expr"]):
                asked |= set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) - labels_of(name)
            unknown |= asked - known
    return unknown


def labels_of(name: str) -> set[str]:
    return set(our_metrics().get(name, {}).get("labels", [])) | SPECIAL_LABELS.get(name, set())


def test_only_known_metrics_are_asked_for() -> None:
    assert unknown_metrics(dashboard()) == set()


def test_only_known_labels_are_asked_for() -> None:
    assert unknown_labels(dashboard()) == set()


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("ray_patchstream_images_total", "ray_patchstream_image_total", unknown_metrics),
        ("ray_node_gpus_utilization", "ray_node_gpu_utilisation", unknown_metrics),
        ("by (stage)", "by (step)", unknown_labels),
        ("SessionName=~", "Session=~", unknown_labels),
    ],
)
def test_a_mistyped_query_is_found(old: str, new: str, check: Any) -> None:
    text = (GRAFANA / "patchstream.json").read_text()
    assert old in text
    assert check(json.loads(text.replace(old, new)))


def test_the_memory_of_a_gpu_is_in_the_unit_that_ray_gives() -> None:
    """Grafana's `mbytes` are mebibytes, its `decmbytes` megabytes."""
    assert "\nMB = 1024 * 1024\n" in (rays_folder() / "dashboard/modules/reporter/gpu_providers.py").read_text()
    (panel,) = [panel for panel in dashboard()["panels"] if "ray_node_gram_used" in panel["targets"][0]["expr"]]
    assert panel["fieldConfig"]["defaults"]["unit"] == "mbytes"


def test_every_metric_of_ours_is_shown() -> None:
    shown = {name for text in expressions(dashboard()) for name in METRIC.findall(text)}
    assert set(our_metrics()) <= shown


def test_counters_are_asked_as_rates_or_totals() -> None:
    for text in expressions(dashboard()):
        for name, metric in our_metrics().items():
            if metric["type"] == "counter" and name in text and not text.startswith("label_values"):
                assert "rate(" in text or re.search(r"\bsum\(", text)


def test_a_job_of_which_every_image_fails_is_seen() -> None:
    """A counter does not exist before it first counts, and an operation on what does not exist gives nothing."""
    board = dashboard()
    (session,) = [variable for variable in board["templating"]["list"] if variable["name"] == "session"]
    assert not set(METRIC.findall(session["query"])) & set(our_metrics())
    (share,) = [panel for panel in board["panels"] if panel["title"] == "Share of failures"]
    for target in share["targets"]:
        rest = re.sub(r"\(sum\(ray_patchstream_\w+\{[^}]*\}\) or vector\(0\)\)", "", target["expr"])
        assert METRIC.findall(rest) == []


def test_what_is_emitted_is_what_is_listed() -> None:
    from pipeline import metrics

    listed = {metric["name"]: (metric["type"], metric["labels"]) for metric in our_metrics().values()}
    emitted = {name: ("counter", list(labels)) for name, (_, labels) in metrics._COUNTERS.items()}
    assert listed == emitted | {name: ("gauge", []) for name in metrics._GAUGES}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert max(Counter(panel["id"] for panel in panels).values()) == 1
    cells = Counter(
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    )
    assert max(cells.values()) == 1
    assert max(x for x, _ in cells) < 24
    assert all(panel["title"] and panel["description"].endswith(".") for panel in panels)
    for first, second in pairwise(panels):
        assert (first["gridPos"]["y"], first["gridPos"]["x"]) < (second["gridPos"]["y"], second["gridPos"]["x"])


def test_every_query_goes_to_the_chosen_data_source_and_session() -> None:
    board = dashboard()
    for panel in board["panels"]:
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            matchers = SELECTOR.findall(target["expr"])
            assert len(matchers) == len(METRIC.findall(target["expr"]))
            assert all('SessionName=~"$session"' in matcher for _, matcher in matchers)
