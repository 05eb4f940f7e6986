"""Files that are not what their names or their headers say, and values of a config that mean nothing."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import make_checkpoint
from support.npz import arrays_of, mixer_arrays_of
from support.s3 import S3Server

from pipeline.models import inspect_model, load_model
from schemas.errors import CheckpointError

SMALL = {"image_size": 32, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 22883\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "vit", "vit-classifier", **SMALL)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspect_model(str(folder))
    return str(caught.value)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pth", "model.npz"])
def test_what_a_download_leaves_in_place_of_weights(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    assert "a git-lfs pointer, not the file itself. Run git lfs pull" in refusal(folder)
    for page in ("<!DOCTYPE html><html>404</html>", "\n<HTML>", "<?xml version='1.0'?><Error>AccessDenied</Error>"):
        (folder / name).write_text(page)
        assert "a web page, not weights" in refusal(folder)


def test_several_checkpoints_in_one_folder(
    folder: Path, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As timm's train.py leaves them. From a store none is fetched before it is known which."""
    monkeypatch.setenv("PATCHSTREAM_CACHE", str(tmp_path / "cache"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name in ("checkpoint-9.pth.tar", "last.pth.tar", "model_best.pth.tar"):
        torch.save(tensors, folder / name)
    options = s3_server.storage_options
    url = s3_server.upload(folder, s3_server.make_bucket(), "output/train")
    for place in (str(folder), url, f"{url}/"):
        with pytest.raises(CheckpointError) as caught:
            inspect_model(place, storage_options=options)
        said = f"{place}: 3 checkpoints there; name one, such as {place.rstrip('/')}/model_best.pth.tar"
        assert str(caught.value) == said
    assert not (tmp_path / "cache").exists()
    assert inspect_model(f"{url}/last.pth.tar", storage_options=options).num_labels == 37


def test_shards_without_their_index_are_not_several_checkpoints(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").touch()
    assert "no weights; expected model.safetensors (or shards with model.safetensors.index.json)" in refusal(folder)


def test_what_deepspeed_saves(folder: Path) -> None:
    whole = inspect_model(str(folder))
    torch.save({"module": load_file(folder / "model.safetensors"), "global_steps": 3}, folder / "states.pt")
    info = inspect_model(str(folder / "states.pt"))
    pixels = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    assert torch.equal(load_model(info)(pixels).logits, load_model(whole)(pixels).logits)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_code(folder: Path) -> None:
    """As OpenAI publishes CLIP."""
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(folder / "ViT-B-32.pt")
    with pytest.raises(CheckpointError, match=r"ViT-B-32\.pt: a TorchScript archive.*openai/clip-vit-base-patch32 for"):
        inspect_model(str(folder / "ViT-B-32.pt"))


@pytest.mark.parametrize("lacks", [True, False])
def test_a_running_mean_of_other_weights_is_told(folder: Path, lacks: bool, caplog: pytest.LogCaptureFixture) -> None:
    last = load_file(folder / "model.safetensors")
    mean = {name: tensor for name, tensor in last.items() if not (lacks and name == "classifier.bias")}
    path = folder / "states.pt"
    torch.save({"model": last, "model_ema": mean}, path)
    inspect_model(str(path))
    said = (
        f"{path}: has a running mean (model_ema), but not of the weights beside it: 1 other names, such as classifier"
    )
    assert (said in caplog.text) == lacks
    assert len(caplog.records) == lacks


def test_a_file_without_tensors_names_its_keys(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"network": {"vit.x": torch.zeros(1)}, "epoch": 3}, folder / "model.pth")
    assert "no tensors, neither at the top nor under state_dict" in (said := refusal(folder))
    assert "its keys are: epoch, network." in said


def test_a_header_whose_type_does_not_fit_its_bytes(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    next(entry for name, entry in header.items() if name != "__metadata__")["dtype"] = "F16"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[start:])
    assert "its header contradicts itself" in refusal(folder)


@pytest.mark.parametrize("value", [None, "1e-12", True, -1, [1e-12]])
def test_an_epsilon_that_is_no_small_number(folder: Path, value: Any) -> None:
    edit(folder / "config.json", layer_norm_eps=value)
    assert f"layer_norm_eps is {value!r}; expected a small number" in refusal(folder)


def test_a_deviation_that_is_null(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", image_std=None)
    assert "preprocessor_config.json: std: Input should be a valid tuple (given: None)" in refusal(folder)


def test_a_mean_over_cls_too(tmp_path: Path) -> None:
    """timm's `pool_include_prefix`, which no tensor shows."""
    import timm
    from safetensors.torch import save_file

    options = {"depth": 1, "embed_dim": 64, "num_heads": 1, "num_classes": 3, "global_pool": "avg"}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, pool_include_prefix=True, **options)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    published = {"input_size": [3, 224, 224], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    arguments = {**options, "pool_include_prefix": True}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "pretrained_cfg": published}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "pool_include_prefix" in refusal(tmp_path)
    edit(tmp_path / "config.json", model_args={**arguments, "pool_include_prefix": False})
    assert inspect_model(str(tmp_path)).pooled == "layernormed_mean_patch_tokens"


def test_attention_over_cls_too(tmp_path: Path) -> None:
    """`pool_include_prefix` of an attention pool; where there is neither CLS nor a register it changes nothing."""
    import timm
    from safetensors.torch import save_file

    published = {"input_size": [3, 224, 224], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    options = {"depth": 1, "embed_dim": 64, "num_heads": 1, "num_classes": 3, "global_pool": "map"}
    for prefix in ({"class_token": True}, {"class_token": False, "reg_tokens": 2}, {"class_token": False}):
        arguments = {**options, **prefix, "pool_include_prefix": True}
        model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **arguments)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "pretrained_cfg": published}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if model.num_prefix_tokens:
            assert "pool_include_prefix" in refusal(tmp_path)
            edit(tmp_path / "config.json", model_args={**arguments, "pool_include_prefix": False})
        assert inspect_model(str(tmp_path)).pooled == "attention_pool"


@pytest.mark.parametrize(
    ("zipped", "whole", "damaged"),
    [
        (True, b"PK\x01\x02", b"????"),
        (True, b"QK\x00Kd", b"QJ\x00Kd"),
        (False, b"QK\x00Kd", b"QJ\x00Kd"),
        (False, b"\x80\x02\x8a", b"\x81\x02\x8a"),
    ],
)
def test_a_bin_with_damaged_bytes(folder: Path, zipped: bool, whole: bytes, damaged: bytes) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"vit.weight": torch.zeros(100)}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    assert whole in data
    path.write_bytes(data.replace(whole, damaged))
    assert f"{path}: not a state dict that torch can read, or truncated" in refusal(folder)


@pytest.mark.parametrize("entry", ['"shape":[1],"data_offsets":[0]', '"shape":[Infinity],"data_offsets":[0,4]'])
def test_a_header_of_another_form(folder: Path, entry: str) -> None:
    text = f'{{"a":{{"dtype":"F32",{entry}}}}}'.encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert "not a safetensors file; its header cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_act": []}, "config.json: hidden_act [] is not supported"),
        ({"architectures": 1}, "its tensors or its config are not those of vit (TypeError: "),
        ({"architectures": {"a": 1}}, "its tensors or its config are not those of vit (KeyError: "),
        ({"num_hidden_layers": 1000}, ": 1000 blocks, but "),
    ],
)
def test_a_config_of_another_form(folder: Path, values: dict[str, Any], said: str) -> None:
    edit(folder / "config.json", **values)
    assert said in refusal(folder)


def drop(part: str) -> Any:
    return lambda arrays: {name: array for name, array in arrays.items() if part not in name}


def flatten(part: str) -> Any:
    return lambda arrays: {name: array.ravel() if part in name else array for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("network", "damage"),
    [
        ("vit_tiny_patch16_224", drop("pos_embedding")),
        ("vit_tiny_patch16_224", drop("query")),
        ("vit_tiny_patch16_224", flatten("embedding/kernel")),
        ("vit_tiny_patch16_224", flatten("query/kernel")),
        ("vit_tiny_r_s16_p8_224", lambda arrays: {**arrays, "conv_root/kernel": np.float32(0)}),
        ("mixer_s16_224", flatten("stem/kernel")),
        ("mixer_s16_224", lambda arrays: {**drop("MixerBlock")(arrays), "MixerBlock_x": np.zeros(1, np.float32)}),
    ],
)
def test_an_npz_of_other_arrays(tmp_path: Path, network: str, damage: Any) -> None:
    import timm

    model = timm.create_model(network, pretrained=False, num_classes=3)
    arrays = mixer_arrays_of(model) if "mixer" in network else arrays_of(model)
    np.savez(tmp_path / "mine.npz", **damage(arrays))
    found = refusal(tmp_path)
    assert str(tmp_path) in found
    assert "its tensors or its config are not those of" in found


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_a_pooler_with_another_activation(tmp_path: Path, kind: str) -> None:
    folder = make_checkpoint(tmp_path / kind, kind, **SMALL)
    assert inspect_model(str(folder)).pooled == "pooler"
    edit(folder / "config.json", pooler_act="gelu")
    assert "pooler_act 'gelu' is not supported; only tanh is" in refusal(folder)


def test_without_a_pooler_its_activation_does_not_matter(folder: Path) -> None:
    edit(folder / "config.json", pooler_act="gelu")
    assert inspect_model(str(folder)).pooled == "mean_patch_tokens"
