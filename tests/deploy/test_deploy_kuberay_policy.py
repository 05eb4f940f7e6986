"""What every rendered manifest must keep: versions, hardening, resources, secrets by reference, a job that is valid."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from support.kustomize import Resource, build

from jobs.cli import app
from pipeline.placement import place
from schemas.machines import Machines
from schemas.spec import build_spec
from schemas.values import ActorRange

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.parent for path in (ROOT / "deploy/kuberay").glob("overlays/*/*/kustomization.yaml"))
MONITORING = ROOT / "deploy/kuberay/components/monitoring"
SHAPES = {
    "RayCluster": ("spec",),
    "RayJob": ("spec", "rayClusterSpec"),
    "RayCronJob": ("spec", "jobTemplate", "rayClusterSpec"),
}
PART_OF = {"app.kubernetes.io/part-of": "patchstream"}

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: f"{path.parent.name}-{path.name}")


def ray_resource(overlay: Path) -> Resource:
    (resource,) = [item for item in build(overlay) if item["kind"] in SHAPES]
    return resource


def cluster_spec(overlay: Path) -> dict[str, Any]:
    node: Any = ray_resource(overlay)
    for part in SHAPES[node["kind"]]:
        node = node[part]
    return dict(node)


def pod_templates(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod template, wherever it stands."""
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        if isinstance(value, dict) and "containers" in value.get("spec", {}):
            yield value
        else:
            yield from pod_templates(value)


def constraint(package: str) -> str:
    match = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert match is not None
    return match.group(1)


@each_overlay
def test_ray_version_is_the_one_that_is_installed_in_the_image(overlay: Path) -> None:
    assert cluster_spec(overlay)["rayVersion"] == constraint("ray")


@each_overlay
def test_all_pods_run_one_image_of_this_release_for_their_hardware(overlay: Path) -> None:
    images = {c["image"] for pod in pod_templates(ray_resource(overlay)) for c in pod["spec"]["containers"]}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    target = "cpu" if overlay.parent.name == "cpu" else "cuda"
    assert images == {f"registry.example.com/patchstream:{version}-{target}"}


@each_overlay
def test_containers_are_confined(overlay: Path) -> None:
    for pod in pod_templates(ray_resource(overlay)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for container in spec["containers"]:
            confined(container["securityContext"])
    confined(cluster_spec(overlay)["autoscalerOptions"]["securityContext"])


def confined(context: dict[str, Any]) -> None:
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}


@each_overlay
def test_what_is_written_has_a_volume(overlay: Path) -> None:
    for pod in pod_templates(ray_resource(overlay)):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) == set(volumes)
            assert "sizeLimit" in volumes[mounts["/tmp"]]["emptyDir"]
            if container["name"].startswith("ray-"):
                assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


@each_overlay
def test_shared_memory_holds_the_object_store_and_fits_the_container(overlay: Path) -> None:
    for pod in pod_templates(cluster_spec(overlay)):
        memory = gibibytes(pod["spec"]["containers"][0]["resources"]["limits"]["memory"])
        (shm,) = [volume["emptyDir"] for volume in pod["spec"]["volumes"] if volume["name"] == "shm"]
        # Ray takes 30% of the memory for its object store, or less where 95% of /dev/shm is.
        assert 0.3 * memory <= 0.95 * gibibytes(shm["sizeLimit"])
        assert gibibytes(shm["sizeLimit"]) <= 0.5 * memory


def gibibytes(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity[:-2])


@each_overlay
def test_every_container_asks_for_what_it_uses(overlay: Path) -> None:
    containers = [c for pod in pod_templates(ray_resource(overlay)) for c in pod["spec"]["containers"]]
    for container in containers:
        for side in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][side])
        if container["name"].startswith("ray-"):
            assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


@each_overlay
def test_workers_promise_ray_no_more_than_they_reserve(overlay: Path) -> None:
    for group in cluster_spec(overlay)["workerGroupSpecs"]:
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@each_overlay
def test_secrets_are_references(overlay: Path) -> None:
    assert "Secret" not in {resource["kind"] for resource in build(overlay)}
    for pod in pod_templates(ray_resource(overlay)):
        for container in pod["spec"]["containers"]:
            assert not [entry for entry in container.get("env", []) if "value" in entry]
    assert cluster_spec(overlay)["authOptions"] == {"mode": "token", "secretName": "patchstream-ray-auth"}


@each_overlay
def test_the_head_does_no_work_and_has_no_gpu(overlay: Path) -> None:
    head = cluster_spec(overlay)["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


@each_overlay
def test_the_autoscaler_is_version_2_and_its_pods_are_not_restarted_in_place(overlay: Path) -> None:
    spec = cluster_spec(overlay)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert {pod["spec"]["restartPolicy"] for pod in pod_templates(spec)} == {"Never"}


@each_overlay
def test_policy_and_monitor_find_the_pods(overlay: Path) -> None:
    resources = {resource["kind"]: resource for resource in build(overlay, MONITORING)}
    for pod in pod_templates(ray_resource(overlay)):
        assert PART_OF.items() <= pod["metadata"]["labels"].items()
    assert resources["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == PART_OF
    assert resources["PodMonitor"]["spec"]["selector"]["matchLabels"] == PART_OF
    (endpoint,) = resources["PodMonitor"]["spec"]["podMetricsEndpoints"]
    for pod in pod_templates(cluster_spec(overlay)):
        ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert endpoint["port"] in ports
    assert resources["NetworkPolicy"]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert all("from" in rule for rule in resources["NetworkPolicy"]["spec"]["ingress"])


@pytest.mark.parametrize(
    ("address", "ports"),
    [("169.254.169.254", {80, 8080}), ("169.254.170.23", {80}), ("169.254.169.252", {987, 988})],
    ids=["amazon-or-dataplane-v2", "eks-pod-identity", "gke-with-calico"],
)
def test_the_clouds_tell_a_pod_who_it_is(address: str, ports: set[int]) -> None:
    (policy,) = [resource for resource in build(OVERLAYS[0]) if resource["kind"] == "NetworkPolicy"]
    rules = [rule for rule in policy["spec"]["egress"] if {"ipBlock": {"cidr": f"{address}/32"}} in rule.get("to", [])]
    assert ports <= {port["port"] for rule in rules for port in rule["ports"]}


@each_overlay
def test_nothing_is_needed_but_kubernetes_and_kuberay(overlay: Path) -> None:
    """One kind that the cluster does not know, and `kubectl apply -k` of the rest fails too."""
    versions = {resource["apiVersion"] for resource in build(overlay)}
    assert versions == {"v1", "networking.k8s.io/v1", "ray.io/v1"}


@each_overlay
def test_the_job_is_a_valid_spec_that_fits_the_cluster(overlay: Path) -> None:
    (config,) = [resource for resource in build(overlay) if resource["kind"] == "ConfigMap"]
    job = build_spec(tomllib.loads(config["data"]["job.toml"]))
    groups = {group["groupName"]: group for group in cluster_spec(overlay)["workerGroupSpecs"]}
    assert job.actors is not None
    assert job.labels == 0, "asked of a checkpoint without a classifier, they end the job; what to edit is the model"
    if overlay.parent.name == "cpu":
        assert job.gpus_per_actor == 0
        check_actors_take_every_core(job.actors, groups["decode"])
    else:
        assert job.gpus_per_actor * job.actors.max <= groups["gpu"]["maxReplicas"]


def check_actors_take_every_core(actors: ActorRange, group: dict[str, Any]) -> None:
    """Of all workers that there may be, with no more actors than fit there, however few there are at the start."""
    limits, most = group["template"]["spec"]["containers"][0]["resources"]["limits"], group["maxReplicas"]
    cpus, memory = int(limits["cpu"]), 0.7 * gibibytes(limits["memory"]) * 2**30
    for nodes in (group["minReplicas"], most):
        machines = Machines(
            cpus=cpus * nodes,
            gpus=0,
            object_store_bytes=0,
            nodes=nodes,
            node_cpus=(cpus,) * nodes,
            node_memory=(memory,) * nodes,
            may_grow=True,
        )
        placed = place(
            machines,
            rows=10**6,
            actors=actors,
            gpus_per_actor=0,
            batch_size=None,
            pixel_bytes=224 * 224 * 3,
            model_bytes=1 << 30,
        )
        assert actors.max * placed.actor_calls * placed.threads >= most * cpus
        assert actors.max <= most * int((cpus - placed.decode_cpus) / placed.actor_cpus)


@each_overlay
def test_the_configuration_is_mounted_where_the_driver_reads_it(overlay: Path) -> None:
    head = cluster_spec(overlay)["headGroupSpec"]["template"]["spec"]
    (mount,) = [mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "job"]
    (volume,) = [volume for volume in head["volumes"] if volume["name"] == "job"]
    (config,) = [resource for resource in build(overlay) if resource["kind"] == "ConfigMap"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    resource = ray_resource(overlay)
    if resource["kind"] != "RayCluster":
        job = resource["spec"].get("jobTemplate", resource["spec"])
        assert f"--config {mount['mountPath']}/job.toml" in job["entrypoint"]


@pytest.mark.parametrize("hardware", ["cpu", "gpu", "spot"])
def test_a_job_ends_and_cleans_up(hardware: str) -> None:
    job = ray_resource(ROOT / f"deploy/kuberay/overlays/{hardware}/job")["spec"]
    assert job["submissionMode"] == "K8sJobMode"
    assert job["shutdownAfterJobFinishes"] is True
    assert job["backoffLimit"] >= 1
    assert job["activeDeadlineSeconds"] > 0
    assert job["ttlSecondsAfterFinished"] > 0
    nightly = ray_resource(ROOT / f"deploy/kuberay/overlays/{hardware}/nightly")["spec"]
    try_s = nightly["jobTemplate"]["activeDeadlineSeconds"]
    changes = {"entrypoint": f"{job['entrypoint']} --update", "activeDeadlineSeconds": try_s}
    assert nightly["jobTemplate"] == {**job, **changes}
    # Every try has a deadline of its own, and the run of the next night takes over from one that has not ended.
    assert 0 < (1 + job["backoffLimit"]) * try_s < 24 * 3600
    assert re.fullmatch(r"\d+ \d+ \* \* \*", nightly["schedule"])


def test_gpu_workers_reserve_a_gpu_and_spot_ones_ask_for_spot_machines() -> None:
    for hardware in ("gpu", "spot"):
        groups = {
            g["groupName"]: g
            for g in cluster_spec(ROOT / f"deploy/kuberay/overlays/{hardware}/job")["workerGroupSpecs"]
        }
        pod = groups["gpu"]["template"]["spec"]
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert "affinity" not in groups["decode"]["template"]["spec"]
        assert ("affinity" in pod) is (hardware == "spot")
        assert hardware == "gpu" or pod["terminationGracePeriodSeconds"] <= 30


@pytest.mark.parametrize("hardware", ["gpu", "spot"])
@pytest.mark.parametrize("shape", ["job", "nightly"])
def test_a_job_asks_for_the_gpus_that_were_scaled_away_before_it_connects(hardware: str, shape: str) -> None:
    overlay = ROOT / f"deploy/kuberay/overlays/{hardware}/{shape}"
    job = ray_resource(overlay)["spec"]
    program, *arguments = shlex.split(job.get("jobTemplate", job)["entrypoint"])
    assert program == "patchstream"
    given = options(arguments)
    (gpu,) = [group for group in cluster_spec(overlay)["workerGroupSpecs"] if group["groupName"] == "gpu"]
    assert gpu["minReplicas"] == 0
    # A machine has to be found, started and to pull the image.
    assert given["cluster_wait"] >= 600
    assert bool(given["update"]) is (shape == "nightly")


def options(arguments: list[str]) -> dict[str, Any]:
    """What the command line makes of them."""
    command: Any = typer.main.get_command(app)
    name, *rest = arguments
    return dict(command.commands[name].make_context(name, rest, parent=typer.Context(command)).params)
