"""The cluster-launcher files are what Ray accepts, and keep what the header of each promises."""

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs/operations.md").read_text()
CLOUDS = ("aws", "gcp")
FILES = (*CLOUDS, "local")
SPOT = {
    "aws": lambda node: node.get("InstanceMarketOptions", {}).get("MarketType") == "spot",
    "gcp": lambda node: node.get("scheduling", {}).get("provisioningModel") == "SPOT",
}


def load(name: str) -> dict[str, Any]:
    return dict(yaml.load((ROOT / f"cluster/{name}.yaml").read_text(), Loader=yaml.CSafeLoader))


@cache
def _prepared(name: str) -> str:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(name))
    validate_config(config)
    return json.dumps(config)


def prepared(name: str) -> dict[str, Any]:
    """The configuration with Ray's defaults for the provider filled in, as `ray up` uses it."""
    return dict(json.loads(_prepared(name)))


def validate(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_it(name: str) -> None:
    assert prepared(name)["cluster_name"] == "patchstream"


@pytest.mark.parametrize("name", FILES)
def test_each_mistyped_key_is_refused(name: str) -> None:
    for key in load(name):
        changed = load(name)
        changed[f"{key}x"] = changed.pop(key)
        with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
            validate(changed)


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("key", ["resources", "min_workers", "max_workers", "node_config", "docker"])
def test_a_mistyped_key_of_a_node_type_is_refused(name: str, key: str) -> None:
    changed = load(name)
    node = changed["available_node_types"]["gpu"]
    node[f"{key}x"] = node.pop(key)
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        validate(changed)


@pytest.mark.parametrize(
    ("place", "value"),
    [(("max_workers",), "12"), (("head_node_type",), "boss"), (("docker", "image"), 1), (("auth", "ssh_user"), 1000)],
)
@pytest.mark.parametrize("name", CLOUDS)
def test_a_wrong_value_is_refused(name: str, place: tuple[str, ...], value: object) -> None:
    changed = load(name)
    node: Any = changed
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = value
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate(changed)


@pytest.mark.parametrize("mutate", [False, True])
def test_amazon_would_accept_the_machines(mutate: bool) -> None:
    botocore = pytest.importorskip("botocore.session")
    from botocore.validate import ParamValidator

    shape = botocore.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node in prepared("aws")["available_node_types"].values():
        request = copy.deepcopy(node["node_config"]) | {"MinCount": 1, "MaxCount": 1}
        if mutate:
            request["InstanceTyp"] = request.pop("InstanceType")
        report = ParamValidator().validate(request, shape)
        assert report.has_errors() is mutate, report.generate_report()


def test_machines_on_amazon_have_an_image_of_their_own() -> None:
    """What Ray fills in is an Ubuntu 18.04 with a driver from before CUDA 13."""
    aws = pytest.importorskip("ray.autoscaler._private.aws.config")
    config = prepared("aws")
    aws._check_ami(config)
    images = {node["node_config"]["ImageId"] for node in config["available_node_types"].values()}
    assert not images & set(aws.DEFAULT_AMI.values())
    (image,) = images
    assert re.fullmatch(
        r"resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-[\w.-]+/latest/ami-id", image
    )


def test_machines_on_google_have_a_driver_for_cuda_13() -> None:
    for node in prepared("gcp")["available_node_types"].values():
        (disk,) = node["node_config"]["disks"]
        driver = re.search(r"/images/family/common-cu\d+-[\w-]+-nvidia-(\d+)$", disk["initializeParams"]["sourceImage"])
        assert driver is not None
        assert int(driver.group(1)) >= 580


def test_the_head_may_hand_the_workers_their_role() -> None:
    """Ray keeps a profile that is named, and looks for its own, which has no such right, only where there is none."""
    aws = pytest.importorskip("ray.autoscaler._private.aws.config")
    config = prepared("aws")
    assert aws._configure_iam_role(copy.deepcopy(config)) == config
    profiles = {
        kind: node["node_config"]["IamInstanceProfile"]["Name"] for kind, node in config["available_node_types"].items()
    }
    assert profiles["head"] not in (profiles["decode"], profiles["gpu"])
    (created,) = re.findall(r"for name in (.*); do\n  aws iam create-role", OPERATIONS)
    assert set(created.split()) == set(profiles.values())
    allowed = [
        (action, statement["Resource"])
        for text in re.findall(r'^{"Version".*?}\]}$', OPERATIONS, re.MULTILINE | re.DOTALL)
        for statement in json.loads(text)["Statement"]
        if "Resource" in statement
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
    ]
    for worker in (profiles["decode"], profiles["gpu"]):
        assert ("iam:PassRole", f"arn:aws:iam::ACCOUNT:role/{worker}") in allowed
    assert {"ec2:RunInstances", "ec2:CreateTags", "ec2:TerminateInstances", "ec2:Describe*"} <= dict(allowed).keys()


def test_the_service_account_of_the_workers_is_the_one_that_is_made() -> None:
    nodes = prepared("gcp")["available_node_types"].values()
    emails = {account["email"] for node in nodes for account in node["node_config"].get("serviceAccounts", [])}
    (created,) = re.findall(r"^gcloud iam service-accounts create (patchstream\S*)", OPERATIONS, re.MULTILINE)
    assert emails == {f"{created}@my-project.iam.gserviceaccount.com"}


@pytest.mark.parametrize("name", CLOUDS)
def test_machines_log_in_before_they_pull(name: str) -> None:
    config = prepared(name)
    login = {"aws": "docker login --username AWS --password-stdin registry.example.com", "gcp": "auth configure-docker"}
    assert any(login[name] in command for command in config["initialization_commands"])
    role = {"aws": "policy/AmazonEC2ContainerRegistryReadOnly", "gcp": "--role roles/artifactregistry.reader"}
    assert role[name] in OPERATIONS


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_has_no_gpu_and_takes_no_task(name: str) -> None:
    config = prepared(name)
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--num-cpus=0" in start
    assert "--num-gpus=0" in start


@pytest.mark.parametrize("name", CLOUDS)
def test_decoders_have_no_gpu_and_gpus_are_on_spot_machines(name: str) -> None:
    nodes = prepared(name)["available_node_types"]
    assert "GPU" not in nodes["decode"]["resources"]
    assert not SPOT[name](nodes["decode"]["node_config"])
    assert nodes["gpu"]["resources"]["GPU"] == 1
    assert SPOT[name](nodes["gpu"]["node_config"])
    assert not SPOT[name](nodes["head"]["node_config"])


@pytest.mark.parametrize("name", CLOUDS)
def test_it_scales_between_none_and_a_bound(name: str) -> None:
    config = prepared(name)
    workers = [node for kind, node in config["available_node_types"].items() if kind != config["head_node_type"]]
    assert all(node["min_workers"] == 0 < node["max_workers"] for node in workers)
    assert config["max_workers"] == sum(node["max_workers"] for node in workers)
    assert config["idle_timeout_minutes"] > 0
    assert any("--autoscaling-config" in command for command in config["head_start_ray_commands"])


@pytest.mark.parametrize("name", FILES)
def test_the_dashboard_is_not_exposed(name: str) -> None:
    (start,) = [command for command in prepared(name)["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize("name", FILES)
def test_a_token_is_asked_for_on_every_machine(name: str) -> None:
    config = prepared(name)
    assert any(path.endswith(".ray/auth_token") for path in config["file_mounts"])
    if name in CLOUDS:
        assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
        (path,) = [o for o in config["docker"]["run_options"] if "RAY_AUTH_TOKEN_PATH" in o]
        assert path.partition("RAY_AUTH_TOKEN_PATH=")[2] in config["file_mounts"]
    else:
        starts = [c for side in ("head", "worker") for c in config[f"{side}_start_ray_commands"] if " start" in c]
        assert len(starts) == 2
        assert all("RAY_AUTH_MODE=token" in command for command in starts)


def test_every_node_finds_the_python_of_its_virtual_environment_first() -> None:
    config = prepared("local")
    for side in ("head", "worker"):
        (start,) = [command for command in config[f"{side}_start_ray_commands"] if "ray start" in command]
        folder = re.search(r"~/(\S+)/ray start", start)
        assert folder is not None
        assert f" PATH=$HOME/{folder[1]}:$PATH " in start.partition(" ~/")[0] + " "


@pytest.mark.parametrize("name", FILES)
def test_objects_spill_to_a_disk_that_is_there(name: str) -> None:
    config = prepared(name)
    for side in ("head", "worker"):
        (start,) = [command for command in config[f"{side}_start_ray_commands"] if "ray start" in command]
        match = re.search(r"--object-spilling-directory=(\S+)", start)
        assert match is not None
        if name in CLOUDS:
            volumes = [option.split(":") for option in config["docker"]["run_options"] if "--volume" in option]
            assert match.group(1) in {inside for _, inside in volumes}
            assert any(volumes[0][0].split()[1] in command for command in config["initialization_commands"])


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_installed_at_the_start(name: str) -> None:
    config = prepared(name)
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert config[key] == []


@pytest.mark.parametrize("name", CLOUDS)
def test_the_images_are_of_this_release(name: str) -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    config = prepared(name)
    assert config["docker"]["image"] == f"registry.example.com/patchstream:{version}-cpu"
    worker = config["available_node_types"]["gpu"]["docker"]["worker_image"]
    assert worker == f"registry.example.com/patchstream:{version}-cuda"


@pytest.mark.parametrize("name", FILES)
def test_the_options_of_ray_start_exist(name: str) -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    config = prepared(name)
    for side in ("head", "worker"):
        (command,) = [line for line in config[f"{side}_start_ray_commands"] if "ray start" in line]
        assert set(re.findall(r"--[a-z-]+", command)) <= known
