"""The manifests of the Triton server: valid, confined, and reachable from the job that they are for."""

import copy
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.kustomize import Resource, build

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/triton"
KUBERNETES_VERSION = "1.35"


def resources() -> dict[tuple[str, str], Resource]:
    return {(item["kind"], item["metadata"]["name"]): item for item in build(FOLDER)}


@pytest.mark.parametrize("key", resources(), ids=lambda key: "-".join(key))
def test_each_resource_is_valid_and_a_mistyped_field_is_found(key: tuple[str, str]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    resource = resources()[key]
    validator.validate(resource, KUBERNETES_VERSION, strict=True)
    for name in resource["spec"]:
        changed: Any = copy.deepcopy(resource)
        changed["spec"][f"{name}x"] = changed["spec"].pop(name)
        with pytest.raises(validator.ValidationError):
            validator.validate(changed, KUBERNETES_VERSION, strict=True)


def test_kubectl_renders_the_same() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl here")
    done = subprocess.run([kubectl, "kustomize", str(FOLDER)], capture_output=True, text=True, timeout=60, check=True)
    rendered = list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))
    assert {(item["kind"], item["metadata"]["name"]): item for item in rendered} == resources()


def test_the_server_is_confined() -> None:
    pod = resources()["Deployment", "patchstream-triton"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["medium"] == "Memory"


def test_the_image_is_of_this_release() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (container,) = resources()["Deployment", "patchstream-triton"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"registry.example.com/patchstream-triton:{version}"


def test_workers_and_server_are_let_together() -> None:
    found = resources()
    labels = found["Deployment", "patchstream-triton"]["spec"]["template"]["metadata"]["labels"]
    assert found["Service", "patchstream-triton"]["spec"]["selector"] == labels
    (port,) = found["Service", "patchstream-triton"]["spec"]["ports"]
    into = found["NetworkPolicy", "patchstream-triton"]["spec"]
    out = found["NetworkPolicy", "patchstream-to-triton"]["spec"]
    assert into["podSelector"]["matchLabels"] == labels
    assert out["egress"][0]["to"][0]["podSelector"]["matchLabels"] == labels
    workers = build(ROOT / "deploy/kuberay/overlays/gpu/cluster")
    (cluster,) = [item for item in workers if item["kind"] == "RayCluster"]
    template = cluster["spec"]["workerGroupSpecs"][0]["template"]["metadata"]["labels"]
    for selector in (into["ingress"][0]["from"][0], out):
        assert selector["podSelector"]["matchLabels"].items() <= template.items()
    assert {rule["ports"][0]["port"] for rule in (into["ingress"][0], out["egress"][0])} == {port["port"]}


def test_the_address_is_the_one_that_the_comment_gives() -> None:
    text = (FOLDER / "kustomization.yaml").read_text()
    assert "--triton-url grpc://patchstream-triton:8001" in text
    assert {item["metadata"]["namespace"] for item in resources().values()} == {"patchstream"}


def test_the_steps_name_the_model_that_the_server_loads() -> None:
    (container,) = resources()["Deployment", "patchstream-triton"]["spec"]["template"]["spec"]["containers"]
    (loaded,) = (arg.removeprefix("--load-model=") for arg in container["args"] if arg.startswith("--load-model="))
    text = (ROOT / "docs/operations.md").read_text()
    job, submitted = (
        text.split("\n3. In `deploy/kuberay/components/cpu/job.toml`: ")[1].split("\n\n")[0].split("; a command")
    )
    given = tomllib.loads("\n".join(re.findall("`([^`]* = [^`]*)`", job)))
    assert given["model"].endswith(f"/{loaded}")
    assert f"`--backend {given['backend']} --triton-url {given['triton']['url']}`" in submitted
