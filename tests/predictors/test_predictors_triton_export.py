"""What `export-triton` writes: a configuration that Triton's own message type reads, and files that stand alone."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from pipeline.models import ModelInfo, inspect_model
from pipeline.predictors.batches import Wanted
from pipeline.predictors.triton import Outage, probabilities
from pipeline.predictors.triton_protocol import Address, check_model, default_model_name, identity, parse_url
from pipeline.predictors.triton_repository import Serving, config_text, export_triton
from schemas.errors import OutputError, SpecError


@pytest.fixture(scope="module")
def make_info(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelInfo]:
    from support.checkpoints import make_checkpoint

    folder = tmp_path_factory.mktemp("models")

    def make(kind: str, **options: int) -> ModelInfo:
        place = folder / kind
        if not place.exists():
            make_checkpoint(place, kind, image_size=32, patch_size=8)
        return inspect_model(str(place), **options)  # type: ignore[arg-type]

    return make


def wanted_of(info: ModelInfo, labels: int = 3) -> Wanted:
    return Wanted(("cls", "pooled"), (info.hidden_size, info.pooled_size), "float32", labels, info.labels, False)


def as_json(text: str) -> dict[str, object]:
    """config.pbtxt as a client gets it back from a server."""
    from google.protobuf.json_format import MessageToDict
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return dict(MessageToDict(text_format.Parse(text, ModelConfig()), preserving_proto_field_name=True))


@pytest.mark.parametrize("backend", ["python", "onnxruntime"])
def test_configuration_is_read_by_tritons_own_message(make_info: Callable[..., ModelInfo], backend: str) -> None:
    info = make_info("vit-classifier")
    config = as_json(config_text(info, "m", Serving("bfloat16", 16, 2, True), backend=backend))
    assert config["backend"] == backend
    assert config["max_batch_size"] == 16
    assert config["instance_group"] == [{"count": 2, "kind": "KIND_GPU"}]
    assert config["version_policy"] == {"latest": {"num_versions": 1}}
    assert config["dynamic_batching"]["preferred_batch_size"] == [16]  # type: ignore[index]
    assert [item["batch_size"] for item in config["model_warmup"]] == [1, 16]  # type: ignore[attr-defined]
    served = check_model(config, info, wanted_of(info), "m")
    assert served.outputs == (("cls", 96), ("pooled", 96), ("logits", 37))
    assert served.dtype == "bfloat16"


def test_a_mistyped_configuration_is_not_read(make_info: Callable[..., ModelInfo]) -> None:
    text = config_text(make_info("vit-classifier"), "m", Serving(), backend="python")
    with pytest.raises(text_format.ParseError):
        as_json(text.replace("dynamic_batching", "dynamic_batch"))


def test_the_same_weights_read_otherwise_are_another_model(make_info: Callable[..., ModelInfo]) -> None:
    info = make_info("vit-classifier")
    config = as_json(config_text(info, "m", Serving(), backend="python"))
    from dataclasses import replace

    brighter = replace(info, preprocessing=info.preprocessing.model_copy(update={"mean": (0.4, 0.4, 0.4)}))
    with pytest.raises(SpecError, match="preprocessing: the run needs"):
        check_model(config, brighter, wanted_of(info), "m")
    normed = replace(info, beit_final_norm=True)
    with pytest.raises(SpecError, match="beit_final_norm: the run needs true, the server has false"):
        check_model(config, normed, wanted_of(info), "m")


def test_a_model_that_somebody_else_put_there_is_refused(make_info: Callable[..., ModelInfo]) -> None:
    info = make_info("vit-classifier")
    config = {"input": [{"name": "image", "data_type": "TYPE_FP32", "dims": ["3", "224", "224"]}], "output": []}
    with pytest.raises(SpecError) as raised:
        check_model(config, info, wanted_of(info), "resnet")
    for part in ("model resnet", "digest", "the server has nothing", "input pixels: not there, the server has image"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("grpc://triton:8001", Address("triton:8001", False, "triton")),
        ("grpcs://triton.example.org:443", Address("triton.example.org:443", True, "triton.example.org")),
        ("grpc://triton", Address("triton:8001", False, "triton")),
        ("grpc://[::1]:9000", Address("[::1]:9000", False, "::1")),
    ],
)
def test_addresses(url: str, address: Address) -> None:
    assert parse_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        *("triton:8001", "http://triton:8000", "grpc://", "grpc://h/v2", "grpc://me:pw@h:1"),
        *("grpc://triton:80O1", "grpc://h:99999", "grpc://[::1", "grpc://me:pw@h:x"),
    ],
)
def test_wrong_addresses(url: str) -> None:
    with pytest.raises(SpecError, match="--triton-url") as raised:
        parse_url(url)
    assert "pw" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("google/vit-base-patch16-224", (224, 224), "vit-base-patch16-224"),
        ("/models/my model/", (224, 224), "my-model"),
        ("s3://bucket/models/vit", (384, 384), "vit-384x384"),
    ],
)
def test_names(make_info: Callable[..., ModelInfo], name: str, size: tuple[int, int], expected: str) -> None:
    from dataclasses import replace

    info = make_info("vit-classifier")
    preprocessing = info.preprocessing.model_copy(update={"resize": size, "crop": None})
    assert default_model_name(replace(info, name=name, preprocessing=preprocessing)) == expected


def test_the_exported_folder_stands_alone(make_info: Callable[..., ModelInfo], tmp_path: Path) -> None:
    info = make_info("vit-classifier")
    (name,) = export_triton(info, str(tmp_path / "repository"), Serving(), onnx=False)
    version = tmp_path / "repository" / name / "1"
    program = """
import json, sys
sys.path.insert(0, sys.argv[1] + "/package")
import torch
from pipeline.models import inspect_model, load_model
info = inspect_model(sys.argv[1] + "/checkpoint")
outputs = load_model(info)(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
ours = [m for n, m in sys.modules.items() if n.partition(".")[0] in ("pipeline", "schemas") and m.__file__]
print(json.dumps({"digest": info.digest, "logits": outputs.logits.shape[1], "files": [m.__file__ for m in ours]}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(version)],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["digest"] == info.digest
    assert found["logits"] == 37
    assert len(found["files"]) > 10
    assert [path for path in found["files"] if not path.startswith(str(version / "package"))] == []
    with pytest.raises(OutputError, match="is there already"):
        export_triton(info, str(tmp_path / "repository"), Serving(), onnx=False)


def test_only_the_checkpoint_is_copied_and_the_server_finds_it(
    make_info: Callable[..., ModelInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under any name, out of the folder of a training script."""
    import torch
    from safetensors.torch import load_file

    from pipeline.predictors.torch_triton_model import TritonPythonModel

    folder = shutil.copytree(make_info("vit-classifier").folder, tmp_path / "trained")
    torch.save(load_file(folder / "model.safetensors"), folder / "mine.bin")
    torch.save({"state": torch.zeros(1)}, folder / "optimizer.pt")
    (folder / "pictures").mkdir()
    (folder / "pictures/1.jpg").touch()
    monkeypatch.setattr(sys, "path", [*sys.path])
    for source, weights in ((folder, "model.safetensors"), (folder / "mine.bin", "mine.bin")):
        info = inspect_model(str(source))
        (name,) = export_triton(info, str(tmp_path / "repository"), Serving(), onnx=False)
        place = tmp_path / "repository" / name
        copied = {path.name for path in (place / "1/checkpoint").iterdir()}
        assert copied == {"config.json", "preprocessor_config.json", weights}
        config = json.dumps(as_json((place / "config.pbtxt").read_text()))
        given = {"model_repository": str(place), "model_version": "1", "model_config": config}
        TritonPythonModel().initialize({**given, "model_instance_kind": "CPU", "model_instance_device_id": "0"})


def test_export_to_another_file_system(make_info: Callable[..., ModelInfo]) -> None:
    import fsspec

    (name,) = export_triton(make_info("vit-classifier"), "memory://repository", Serving(), onnx=False)
    memory = fsspec.filesystem("memory")
    assert memory.exists(f"/repository/{name}/config.pbtxt")
    assert memory.exists(f"/repository/{name}/1/checkpoint/model.safetensors")
    assert memory.exists(f"/repository/{name}/1/package/pipeline/models/load.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit-classifier", "vit", "beit", "beit-classifier"])
def test_onnx_gives_what_the_network_gives(make_info: Callable[..., ModelInfo], tmp_path: Path, kind: str) -> None:
    import onnxruntime
    import torch

    from pipeline.models import load_model

    info = make_info(kind)
    names = export_triton(info, str(tmp_path), Serving(max_batch_size=4))
    assert names == [default_model_name(info), f"{default_model_name(info)}-onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / names[1] / "1/model.onnx"))
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("pixels", "tensor(uint8)", ["batch", 32, 32, 3])
    outputs = [item.name for item in session.get_outputs()]
    config = as_json((tmp_path / names[1] / "config.pbtxt").read_text())
    assert [item["name"] for item in config["output"]] == outputs  # type: ignore[attr-defined]
    pixels = np.random.default_rng(1).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    expected = load_model(info)(torch.from_numpy(pixels))
    for name, got in zip(outputs, session.run(outputs, {"pixels": pixels}), strict=True):
        wanted = getattr(expected, name).numpy()
        assert np.abs(got - wanted).max() <= 1e-4 * max(1.0, np.abs(wanted).max())


@pytest.mark.slow
def test_onnx_that_is_off_does_not_count(
    make_info: Callable[..., ModelInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.predictors import torch_onnx
    from schemas.errors import CheckpointError

    monkeypatch.setattr(torch_onnx, "TOLERANCE", 1e-12)
    with pytest.raises(CheckpointError, match=r"ONNX output \w+ is off by"):
        export_triton(make_info("vit-classifier"), str(tmp_path), Serving())
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_packages_says_what_to_do(
    make_info: Callable[..., ModelInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.predictors.torch_onnx.find_spec", lambda name: None)
    with pytest.raises(SpecError, match="pip install onnx onnxruntime, or give --no-onnx"):
        export_triton(make_info("vit-classifier"), str(tmp_path), Serving())
    assert list(tmp_path.iterdir()) == []


def test_identity_names_what_decides_the_result(make_info: Callable[..., ModelInfo]) -> None:
    info = make_info("vit-classifier")
    assert identity(info) == identity(info)
    assert set(identity(info)) == {"digest", "preprocessing", "pooled", "beit_final_norm"}


@pytest.mark.parametrize("multi_label", [False, True])
def test_probabilities(multi_label: bool) -> None:
    import torch

    logits = np.random.default_rng(0).normal(scale=40, size=(50, 1000)).astype(np.float32)
    got = probabilities(logits, multi_label=multi_label)
    tensor = torch.from_numpy(logits)
    expected = torch.sigmoid(tensor) if multi_label else torch.softmax(tensor, dim=1)
    assert got.dtype == np.float32
    assert np.abs(got - expected.numpy()).max() < 1e-6


def test_outage_counts_from_the_first_unanswered_request() -> None:
    now = [100.0]
    outage = Outage(10.0, clock=lambda: now[0])
    assert not outage.is_over_limit
    assert outage.remaining_s() == 10.0
    now[0] = 107.0
    assert outage.remaining_s() == 3.0
    now[0] = 111.0
    assert outage.remaining_s() == -1.0
    assert outage.is_over_limit
    outage.answered()
    assert not outage.is_over_limit
    assert outage.remaining_s() == 10.0
