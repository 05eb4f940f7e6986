"""docs/operations.md names files, commands, options and metrics that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/operations.md").read_text()
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"^```\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)]
COMMANDS = [line.strip() for block in BLOCKS for line in block.splitlines()]
# vCPUs and GiB.
MACHINES = {
    "m7i.xlarge": (4, 16),
    "m7i.4xlarge": (16, 64),
    "g6.2xlarge": (8, 32),
    "n2-standard-4": (4, 16),
    "n2-standard-16": (16, 64),
    "g2-standard-8": (8, 32),
}


def test_each_file_that_is_named_exists() -> None:
    named = set(re.findall(r"\b((?:deploy|cluster|docs)/[\w./-]*[\w])", TEXT))
    assert len(named) > 12
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_each_overlay_is_explained() -> None:
    for hardware in ("cpu", "gpu", "spot"):
        assert f"`{hardware}/…`" in TEXT
    for shape in ("job", "nightly", "cluster"):
        assert f"`…/{shape}`" in TEXT


@pytest.mark.parametrize("command", sorted(set(re.findall(r"(?:`|^)patchstream ([a-z-]+)", TEXT, re.MULTILINE))))
def test_each_command_exists(command: str) -> None:
    sources = [path.read_text() for path in (ROOT / "jobs").glob("*.py")]
    assert any(f'"{command}":' in source for source in sources if "COMMANDS" in source)


def test_each_spec_key_exists() -> None:
    from schemas.spec import FetchSpec, JobSpec, TritonSpec

    for prefix, model in (("fetch", FetchSpec), ("triton", TritonSpec)):
        keys = set(re.findall(rf"`{prefix}\.(\w+)`", TEXT))
        assert keys
        assert keys <= set(model.model_fields)
    assert {"batch_size", "gpus_per_actor", "actors"} <= set(JobSpec.model_fields)


def test_each_metric_exists() -> None:
    known = {f"ray_{metric['name']}" for metric in json.loads((ROOT / "deploy/grafana/metrics.json").read_text())}
    assert set(re.findall(r"ray_patchstream_\w+", TEXT)) <= known


def test_an_alert_on_images_fires_where_every_one_fails() -> None:
    """Their counter does not exist before the first success, and nothing is never more than what is not there."""
    alerts = re.findall(r"^\| [^|]+ \| `([^`]*ray_patchstream_images_total[^`]*)`", TEXT, re.MULTILINE)
    assert len(alerts) == 2
    for alert in alerts:
        rest = re.sub(r"\(sum\(rate\(ray_patchstream_images_total\[\w+\]\)\) or vector\(0\)\)", "", alert)
        assert "ray_patchstream_images_total" not in rest


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_each_heading_of_the_contents_exists(page: Path) -> None:
    text = page.read_text()
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("#").lower()).strip().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_secrets_and_namespace_are_those_of_the_manifests() -> None:
    cluster = (ROOT / "deploy/kuberay/base/raycluster.yaml").read_text()
    for secret in re.findall(r"create secret generic (\S+)", TEXT):
        assert secret in cluster
    assert "create namespace patchstream" in TEXT
    overlays = [path.read_text() for path in (ROOT / "deploy/kuberay/overlays").glob("*/*/kustomization.yaml")]
    assert all("namespace: patchstream" in text for text in overlays)


def test_the_ray_version_is_the_pinned_one() -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert set(re.findall(r"ray\[default\]==([\d.]+)", TEXT)) == {pinned.group(1)}


def test_a_submitted_job_has_a_token_and_waits_for_its_gpus() -> None:
    blocks = [block for block in BLOCKS if "patchstream submit" in block]
    assert len(blocks) == 2
    for block in blocks:
        assert "export RAY_AUTH_MODE=token" in block.partition("patchstream submit")[0]
        assert re.search(r"--cluster-wait \d{3}", block.partition("patchstream submit")[2])


def test_a_submitted_job_asks_for_no_variable_that_the_cluster_of_the_page_lacks() -> None:
    """Where machines have an identity, no variable holds a key; the others have what is in the Secret."""
    assert [command for command in COMMANDS if command.startswith("patchstream submit") and " --env " in command] == []
    asked = set(re.findall(r"--env (?!NAME)(\w+)", TEXT))
    assert asked
    assert asked <= set(re.findall(r"--from-literal=([A-Z_]+)=", TEXT))


def test_amazon_commands_for_kubernetes_name_the_region_and_the_provider_of_identities() -> None:
    commands = [command for command in COMMANDS if command.startswith("eksctl ")]
    assert len(commands) == 5
    assert all(" --region eu-central-1 " in command for command in commands)
    assert all("--with-oidc" in command for command in commands if "create cluster" in command)


def test_a_worker_fits_the_disk_of_a_node_on_google() -> None:
    """GKE sets aside 10% for eviction and 35% + 6 GiB (at most half) for itself; a file system is 94% of its disk."""
    sizes = [
        int(found.group(1)) if (found := re.search(r"--disk-size (\d+)", command)) else 100
        for command in COMMANDS
        if command.startswith("gcloud container node-pools create")
    ]
    assert len(sizes) == 2
    manifests = [ROOT / "deploy/kuberay/base/raycluster.yaml", ROOT / "deploy/kuberay/components/gpu/gpu-workers.yaml"]
    asked = [int(gib) for path in manifests for gib in re.findall(r"ephemeral-storage: (\d+)Gi", path.read_text())]
    for size in sizes:
        assert 0.94 * 0.9 * size - min(0.35 * size + 6, 0.5 * size) >= max(asked)


def test_the_quotas_carry_the_machines() -> None:
    """Amazon's vCPUs by the family of the machine, Google's of N2; its first pool is there in each of three zones."""
    quotas = {name: int(value) for name, value in re.findall(r"--quota-code (\S+) --desired-value (\d+)", TEXT)}
    wanted = dict.fromkeys(quotas, 0)
    for command in (command for command in COMMANDS if command.startswith("eksctl create nodegroup")):
        machine, most = re.findall(r"--node-type (\S+)|--nodes-max (\d+)", command)
        for code in ("L-3819A6DF", "L-DB2E81BA") if machine[0].startswith("g") else ("L-1216C47A",):
            wanted[code] += MACHINES[machine[0]][0] * int(most[1])
    assert wanted == quotas
    (head,) = re.findall(r"--machine-type (n2\S+) --num-nodes (\d+)", TEXT)
    (decode,) = re.findall(r"--machine-type (n2\S+) .*--max-nodes (\d+)", "\n".join(COMMANDS))
    needed = 3 * MACHINES[head[0]][0] * int(head[1]) + MACHINES[decode[0]][0] * int(decode[1])
    assert [needed] == list(map(int, re.findall(r"N2_CPUS: (\d+)", TEXT)))


def test_the_policy_lets_objects_be_read_in_an_earlier_version() -> None:
    """An address on S3 may name one."""
    (policy,) = [json.loads(block) for block in BLOCKS if '"s3:PutObject"' in block]
    objects = next(item for item in policy["Statement"] if item["Resource"].endswith("/*"))
    assert {"s3:GetObject", "s3:GetObjectVersion", "s3:PutObject", "s3:DeleteObject"} <= set(objects["Action"])


def machines_of(pool: str) -> list[str]:
    """The types that Amazon's commands and Google's name for a pool; Google's first pool is made with the cluster."""
    google = "clusters create patchstream" if pool == "head" else f"node-pools create {pool}"
    patterns = (
        rf"eksctl create nodegroup .*--name {pool} --node-type (\S+)",
        rf"gcloud container {google} .*--machine-type (\S+)",
    )
    found = [found.group(1) for pattern in patterns for command in COMMANDS if (found := re.match(pattern, command))]
    assert len(found) == 2
    return found


def left_to_pods(machine: str) -> tuple[float, float]:
    """CPUs and GiB. Both clouds keep 6% of the first core, 1% of the second, 0.5% of two more and 0.25% of the rest; of
    the memory the kernel has 2%, and Google, which keeps more than Amazon, a share that falls and 100 MiB. Half a CPU
    and 1 GiB are for what else runs on every node."""
    cpus, memory = MACHINES[machine]
    kept, above = 0.02 * memory + 0.1, 0.0
    for width, share in ((4, 0.25), (4, 0.2), (8, 0.1), (112, 0.06)):
        kept += share * min(max(memory - above, 0), width)
        above += width
    return cpus - 0.08 - 0.0025 * (cpus - 4) - 0.5, memory - kept - 1


def asked_by(*containers: dict[str, Any]) -> tuple[float, float]:
    """CPUs and GiB that one pod requests."""
    requests = [container["resources"]["requests"] for container in containers]
    cpus = [int(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu) for cpu in (each["cpu"] for each in requests)]
    return sum(cpus), sum(float(each["memory"].removesuffix("Gi")) for each in requests)


def test_each_pod_fits_its_machine_and_decoding_ones_fill_it() -> None:
    spec = yaml.safe_load((ROOT / "deploy/kuberay/base/raycluster.yaml").read_text())["spec"]
    (patch,) = yaml.safe_load((ROOT / "deploy/kuberay/components/gpu/gpu-workers.yaml").read_text())
    head, decode, gpu = (
        group["template"]["spec"]["containers"][0]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"], patch["value"])
    )
    pods = {"head": asked_by(head, spec["autoscalerOptions"]), "decode": asked_by(decode), "gpu": asked_by(gpu)}
    for pool, (cpus, memory) in pods.items():
        for machine in machines_of(pool):
            free_cpus, free_memory = left_to_pods(machine)
            fit = min(int(free_cpus / cpus), int(free_memory / memory))
            assert fit >= 1, f"{pool} on {machine}"
            assert pool != "decode" or fit * cpus >= 0.9 * MACHINES[machine][0], machine
