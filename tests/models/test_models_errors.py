"""A checkpoint that cannot be used says what was given, what is wrong with it and what to do."""

import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint
from support.ports import free_port

from pipeline.models import inspect_model, load_model
from schemas.errors import CheckpointError

SMALL = {"image_size": 32, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("saved") / "vit", "vit-classifier", **SMALL)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, name: str = "config.json", **values: Any) -> None:
    config = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def refusal(folder: Path | str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspect_model(str(folder), **options)
    return str(caught.value)


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["vit.encoder.layer.1.output.dense.bias"]
        tensors["vit.encoder.layer.9.output.dense.bias"] = torch.zeros(32)
        tensors["vit.layernorm.weight"] = torch.zeros(31)

    edit_tensors(folder, change)
    message = refusal(folder)
    assert "taken for vit in Hugging Face layout, as config.json says model_type 'vit'" in message
    assert "1 missing: vit.encoder.layer.1.output.dense.bias [32]" in message
    assert "1 unexpected: vit.encoder.layer.9.output.dense.bias [32]" in message
    assert "1 of another shape: vit.layernorm.weight: [31], expected [32]" in message


def test_announced_classifier_that_is_not_there(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: (tensors.pop("classifier.weight"), tensors.pop("classifier.bias")))
    assert "2 missing: classifier.weight [37, 32], classifier.bias [37]" in refusal(folder)


def test_another_family(folder: Path) -> None:
    edit_config(folder, model_type="resnet")
    message = refusal(folder)
    assert "resnet" in message
    assert "vit (Hugging Face)" in message


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 does not divide hidden_size 32"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ({"num_channels": 1}, "num_channels is 1"),
        ({"patch_size": [16, 16, 16]}, "patch_size is [16, 16, 16]"),
        ({"id2label": {"0": "cat"}}, "the config names 1 classes, but the classifier has 37"),
    ],
)
def test_config_that_cannot_be(folder: Path, values: Mapping[str, Any], said: str) -> None:
    edit_config(folder, **values)
    assert said in refusal(folder)


def test_truncated_safetensors_is_named_with_both_sizes(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    message = refusal(folder)
    assert str(path) in message
    assert f"expected {len(whole)} bytes, it has {len(whole) - 100}" in message
    path.write_bytes(whole[:50])
    assert "truncated; its header alone needs" in refusal(folder)
    path.write_bytes(b"\xff" * 64)
    assert "not a safetensors file" in refusal(folder)
    path.write_bytes((5).to_bytes(8, "little") + b"[[[[[")
    assert "header cannot be read" in refusal(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"classifier.weight": torch.zeros(37, 32, dtype=torch.int8)}))
    message = refusal(folder)
    assert "classifier.weight is I8" in message


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def test_a_list_is_no_state_dict(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save([torch.zeros(2)], folder / "pytorch_model.bin")
    assert "holds a list, not a state dict" in refusal(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_never_runs(folder: Path, tmp_path: Path, zipped: bool) -> None:
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "ran"
    content = {"weight": torch.zeros(1), "payload": Payload(str(marker))}
    if zipped:
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    message = refusal(folder)
    assert "run code" in message
    assert "save_file" in message
    assert not marker.exists()


def test_compressed_archive_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10_000_000))
    assert "unpacks to 10000000" in refusal(folder)


def test_archive_of_another_kind_is_refused(folder: Path) -> None:
    """torch read tar archives once; one that unpacks to more than there is memory must not be looked into."""
    (folder / "model.safetensors").unlink()
    with tarfile.open(folder / "pytorch_model.bin", "w") as archive:
        member = tarfile.TarInfo("storages")
        member.size = 10_000_000
        archive.addfile(member, io.BytesIO(bytes(10_000_000)))
    assert "pytorch_model.bin" in refusal(folder)
    with tarfile.open(folder / "pytorch_model.bin", "w:gz") as archive:
        archive.addfile(member, io.BytesIO(bytes(10_000_000)))
    assert "pytorch_model.bin" in refusal(folder)


def test_json_bombs_are_refused(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    with (folder / "config.json").open("wb") as file:
        file.truncate(65 * 1024 * 1024)
    assert "a config of more than 67108864 bytes is refused" in refusal(folder)
    (folder / "config.json").write_text('{"a":' * 100_000)
    assert "config.json: not JSON" in refusal(folder)
    (folder / "config.json").write_text(config)
    nested = b'{"a":' * 100_000
    (folder / "model.safetensors").write_bytes(len(nested).to_bytes(8, "little") + nested)
    assert "its header cannot be read" in refusal(folder)
    (folder / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    assert "not a safetensors file" in refusal(folder)


def test_truncated_bin(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1000)}, folder / "pytorch_model.bin")
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:2000])
    assert "pytorch_model.bin" in refusal(folder)
    assert "2000 bytes" in refusal(folder)


@pytest.mark.parametrize("legacy", [False, True])
def test_bin_loads_like_safetensors(saved: Path, folder: Path, legacy: bool) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    there, here = (load_model(inspect_model(str(path)))(pixels) for path in (saved, folder))
    assert there.logits is not None
    assert here.logits is not None
    assert torch.equal(there.logits, here.logits)


def shard(folder: Path) -> dict[str, str]:
    """Split the weights of `folder` into two shards; returns the weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, names in enumerate([sorted(tensors)[::2], sorted(tensors)[1::2]], start=1):
        shard_name = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / shard_name)
        weight_map |= dict.fromkeys(names, shard_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_shards(saved: Path, folder: Path) -> None:
    shard(folder)
    pixels = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    there, here = (load_model(inspect_model(str(path)))(pixels) for path in (saved, folder))
    assert torch.equal(there.pooled, here.pooled)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "shards are missing beside it: model-00002-of-00002.safetensors" in refusal(folder)


def test_shard_outside_the_folder_is_refused(folder: Path) -> None:
    weight_map = shard(folder)
    stolen = dict.fromkeys(weight_map, "../secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": stolen}))
    assert "does not lie beside the index" in refusal(folder)


def test_no_weights_and_no_config(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "Found: nothing" in refusal(tmp_path / "empty")
    (folder / "config.json").write_text("[" * 200_000)
    assert "config.json: not JSON" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "no weights; expected model.safetensors" in refusal(folder)


def test_size_that_does_not_divide_into_patches(folder: Path) -> None:
    assert "--image-size 32 or 48 does" in refusal(folder, image_size=40)


def test_final_norm_is_for_beit_pretraining(folder: Path, tmp_path: Path) -> None:
    assert "--beit-final-norm is for BEiT" in refusal(folder, beit_final_norm=True)
    classifier = make_checkpoint(tmp_path / "beit", "beit-classifier", **SMALL)
    assert "no trained final norm" in refusal(classifier, beit_final_norm=True)


def test_no_such_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_offline_hub_model(isolated_env: Callable[[Mapping[str, str]], dict[str, str]]) -> None:
    code = (
        "from pipeline.models import inspect_model\nfrom schemas.errors import CheckpointError\n"
        "try: inspect_model('google/vit-base-patch16-224')\nexcept CheckpointError as error: print(error)"
    )
    places = {
        "HF_HUB_OFFLINE is set": {"HF_HUB_OFFLINE": "1"},
        "the hub cannot be reached": {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"},
    }
    for said, variables in places.items():
        done = subprocess.run(
            [sys.executable, "-c", code], env=isolated_env(variables), capture_output=True, text=True, timeout=60
        )
        assert said in done.stdout, done.stderr
        assert "hf download google/vit-base-patch16-224" in done.stdout


def test_moved_checkpoint_must_be_the_same(saved: Path, folder: Path) -> None:
    from dataclasses import replace

    info = inspect_model(str(saved))
    moved = replace(info, folder=str(folder / "gone"), name=str(folder))
    load_model(moved)
    edit_tensors(folder, lambda tensors: tensors["classifier.bias"].add_(1))
    with pytest.raises(CheckpointError, match="digest"):
        load_model(moved)


def test_info_is_small_and_picklable(saved: Path) -> None:
    info = inspect_model(str(saved))
    packed = pickle.dumps(info)
    assert pickle.loads(packed) == info
    assert len(packed) < 50_000
    assert info.labels == tuple(f"LABEL_{i}" for i in range(37))


def test_importing_and_inspecting_needs_no_torch(saved: Path) -> None:
    code = (
        "import sys; from pipeline.models import inspect_model; "
        f"inspect_model({str(saved)!r}); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
