"""Every manifest that the overlays render is valid for KubeRay and Kubernetes, and a mistyped field is not."""

import copy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support.crd import CRDS, FILES, METADATA, problems
from support.kustomize import Resource, build

KUBERAY = Path(__file__).parents[2] / "deploy/kuberay"
OVERLAYS = sorted(path.parent for path in KUBERAY.glob("overlays/*/*/kustomization.yaml"))
KUBERNETES_VERSION = "1.35"

needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason=f"no KubeRay CRDs at {CRDS}")

# The fields of a PodMonitor (monitoring.coreos.com/v1) that we use; prometheus-operator's own CRD has many more.
LABEL_SELECTOR = {
    "type": "object",
    "required": ["matchLabels"],
    "additionalProperties": False,
    "properties": {"matchLabels": {"type": "object", "additionalProperties": {"type": "string"}}},
}
POD_MONITOR = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "PodMonitor"},
        "metadata": METADATA,
        "spec": {
            "type": "object",
            "required": ["selector", "podMetricsEndpoints"],
            "additionalProperties": False,
            "properties": {
                "selector": LABEL_SELECTOR,
                "podTargetLabels": {"type": "array", "items": {"type": "string"}},
                "podMetricsEndpoints": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["port"],
                        "additionalProperties": False,
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string", "pattern": "^/"},
                            "interval": {"type": "string", "pattern": "^[0-9]+(s|m)$"},
                        },
                    },
                },
            },
        },
    },
}


def rendered(kind: str) -> list[tuple[str, Resource]]:
    return [
        (f"{overlay.parent.name}-{overlay.name}", resource)
        for overlay in OVERLAYS
        for resource in build(overlay)
        if resource["kind"] == kind
    ]


def keys(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Path of each mapping key below `node`."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        if isinstance(node, dict):
            yield (*place, key)
        yield from keys(value, (*place, key))


def mistype(resource: Resource, place: tuple[Any, ...]) -> Resource:
    """A copy in which one key has lost its last letter."""
    changed = copy.deepcopy(resource)
    node: Any = changed
    for part in place[:-1]:
        node = node[part]
    node[place[-1][:-1]] = node.pop(place[-1])
    return changed


def names_are_free(place: tuple[Any, ...]) -> bool:
    """Whether the key at `place` is the user's to choose, so that no schema can call it mistyped."""
    return place[-2:-1] in [("labels",), ("annotations",), ("matchLabels",), ("limits",), ("requests",), ("data",)] or (
        place[-2:-1] == ("rayStartParams",)
    )


def test_nine_overlays() -> None:
    assert {f"{path.parent.name}/{path.name}" for path in OVERLAYS} == {
        f"{hardware}/{shape}" for hardware in ("cpu", "gpu", "spot") for shape in ("cluster", "job", "nightly")
    }


@needs_crds
@pytest.mark.parametrize("kind", FILES)
def test_each_kuberay_resource_is_valid(kind: str) -> None:
    resources = rendered(kind)
    assert len(resources) == 3
    assert {name: problems(resource) for name, resource in resources if problems(resource)} == {}


@needs_crds
@pytest.mark.parametrize("kind", FILES)
def test_each_mistyped_field_is_found(kind: str) -> None:
    resource = dict(rendered(kind))[
        f"spot-{ {'RayCluster': 'cluster', 'RayJob': 'job', 'RayCronJob': 'nightly'}[kind] }"
    ]
    places = [place for place in keys(resource["spec"], ("spec",)) if not names_are_free(place)]
    assert len(places) > 200
    # One of each name at each depth says the same as every one, and takes a tenth of the time.
    sample = {(len(place), place[-1]): place for place in places}.values()
    assert [place for place in sample if not problems(mistype(resource, place))] == []


@needs_crds
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "submissionMode"), 3),
        (("spec", "backoffLimit"), "two"),
        (("spec", "shutdownAfterJobFinishes"), "yes"),
        (("spec", "rayClusterSpec", "autoscalerOptions", "version"), "v3"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "password"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("apiVersion",), "ray.io/v1alpha2"),
    ],
)
def test_a_wrong_value_is_found(place: tuple[str, ...], value: object) -> None:
    resource = dict(rendered("RayJob"))["gpu-job"]
    node: Any = resource
    for part in place[:-1]:
        node = node[part]
    assert place[-1] in node
    node[place[-1]] = value
    if place == ("apiVersion",):
        with pytest.raises(ValueError, match="not served"):
            problems(resource)
    else:
        assert problems(resource)


@pytest.mark.parametrize("kind", ["NetworkPolicy", "ServiceAccount", "ConfigMap"])
def test_each_kubernetes_resource_is_valid_and_a_mistyped_field_is_found(kind: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    resources = rendered(kind)
    assert len(resources) == len(OVERLAYS)
    for _, resource in resources:
        validator.validate(resource, KUBERNETES_VERSION, strict=True)
    _, resource = resources[0]
    for place in keys(resource):
        if not names_are_free(place):
            with pytest.raises((validator.ValidationError, KeyError)):
                validator.validate(mistype(resource, place), KUBERNETES_VERSION, strict=True)


def test_each_pod_monitor_is_valid_and_a_mistyped_field_is_found() -> None:
    monitors = [
        resource
        for overlay in OVERLAYS
        for resource in build(overlay, KUBERAY / "components/monitoring")
        if resource["kind"] == "PodMonitor"
    ]
    assert [monitor["metadata"]["namespace"] for monitor in monitors] == ["patchstream"] * len(OVERLAYS)
    for resource in monitors:
        jsonschema.validate(resource, POD_MONITOR)
    for place in keys(resource):
        if not names_are_free(place):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(mistype(resource, place), POD_MONITOR)


def test_an_overlay_that_names_the_monitoring_has_it(tmp_path: Path) -> None:
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    overlay = tmp_path / "kuberay/overlays/spot/nightly"
    with (overlay / "kustomization.yaml").open("a") as file:
        file.write("  - ../../../components/monitoring\n")
    assert build(overlay) == build(KUBERAY / "overlays/spot/nightly", KUBERAY / "components/monitoring")
    assert "PodMonitor" in {resource["kind"] for resource in build(overlay)}
    test_kubectl_renders_the_same(overlay)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_kubectl_renders_the_same(overlay: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl here")
    done = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True, timeout=60, check=False)
    if "components" in done.stderr or "unknown" in done.stderr:
        pytest.skip(f"this kubectl carries a kustomize that is too old: {done.stderr.splitlines()[0][:100]}")
    assert done.returncode == 0, done.stderr
    assert in_order(list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))) == in_order(build(overlay))


def in_order(resources: list[Resource]) -> list[Resource]:
    return sorted(resources, key=lambda resource: (resource["kind"], resource["metadata"]["name"]))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("components/gpu/kustomization.yaml", "patches:", "patchs:"),
        ("components/gpu/kustomization.yaml", "kind: RayCluster", "kind: RayClutser"),
        ("components/spot/spot-workers.yaml", "value: gpu", "value: decode"),
        ("components/job/kustomization.yaml", "[spec.rayClusterSpec]", "[spec.rayCluster.spec]"),
    ],
)
def test_a_broken_kustomization_is_refused(tmp_path: Path, file: str, old: str, new: str) -> None:
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    path = tmp_path / "kuberay" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises((ValueError, KeyError)):
        build(tmp_path / "kuberay/overlays/spot/job")
