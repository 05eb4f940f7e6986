"""A classifier that is all zeros, as google-research published before fine-tuning, is none."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support import lit
from support.checkpoints import spread_out
from support.npz import Arrays, arrays_of, mixer_arrays_of

from jobs.cli import run_command
from pipeline.models import inspect_model, load_model
from pipeline.online import Settings, answer
from pipeline.opening import resolve_job
from schemas.errors import CheckpointError, SpecError
from schemas.spec import build_spec

SMALL = {"img_size": 64, "embed_dim": 48, "num_classes": 7}
HEAD = ("head/bias", "head/kernel")


def arrays_for(kind: str) -> Arrays:
    import timm
    from timm.models.mlp_mixer import MlpMixer

    if kind == "mixer":
        model = MlpMixer(patch_size=16, num_blocks=2, **SMALL)
    else:
        name = "vit_tiny_r_s16_p8_224" if kind == "hybrid" else "vit_base_patch16_224"
        model = timm.create_model(name, pretrained=False, depth=2, num_heads=4, **SMALL)
    spread_out(model.eval(), seed=0)
    if kind == "mixer":
        return mixer_arrays_of(model)
    pooler = np.random.default_rng(0).normal(size=(48, 48)).astype(np.float32)
    return arrays_of(model) | {"pre_logits/kernel": pooler, "pre_logits/bias": pooler[0]}


def zeroed(arrays: Arrays, *names: str) -> Arrays:
    return {name: np.zeros_like(array) if name.endswith(names) else array for name, array in arrays.items()}


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
@pytest.mark.parametrize("kind", ["vit", "hybrid", "mixer"])
def test_the_features_are_those_of_the_same_arrays_with_a_head(kind: str, prefix: str, tmp_path: Path) -> None:
    arrays = {f"{prefix}{name}": array for name, array in arrays_for(kind).items()}
    np.savez(tmp_path / "trained.npz", **arrays)
    np.savez(tmp_path / "zeros.npz", **zeroed(arrays, *HEAD))
    trained, info = (inspect_model(str(tmp_path / name)) for name in ("trained.npz", "zeros.npz"))
    assert (trained.num_labels, trained.zero_head) == (7, 0)
    assert (info.num_labels, info.labels, info.pooled, info.zero_head) == (0, (), trained.pooled, 7)
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected, ours = load_model(trained)(pixels), load_model(info)(pixels)
    assert expected.logits is not None
    assert ours.logits is None
    assert torch.equal(ours.pooled, expected.pooled)
    assert ours.cls is expected.cls is None or torch.equal(ours.cls, expected.cls)


@pytest.mark.parametrize("name", HEAD)
def test_zeros_in_one_of_its_arrays_are_no_sign(name: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", **zeroed(arrays_for("vit"), name))
    assert inspect_model(str(tmp_path)).num_labels == 7


def test_the_projection_of_a_tower_is_no_classifier(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", **zeroed(lit.random_pair("bert"), *(f"img/{name}" for name in HEAD)))
    assert inspect_model(str(tmp_path)).pooled == "projected_cls"


def test_labels_are_refused_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "ViT-X.npz")
    np.savez(path, **zeroed(arrays_for("vit"), *HEAD))
    spec = {"sources": ("photos",), "model": path, "out": "out"}
    reason = r"ViT-X\.npz \(vit\) has no classifier: its head of 7 classes is all zeros"
    with pytest.raises(SpecError, match=reason):
        resolve_job(build_spec({**spec, "labels": 5}))
    assert resolve_job(build_spec(spec)).wanted.features == ("cls", "pooled")
    with pytest.raises(SpecError, match=reason):
        answer(inspect_model(path), [], Settings())
    assert run_command(["models", path]) == 0
    assert "pooler 48, left out: 7 classes, all zeros" in capsys.readouterr().out


def test_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    head = {"head/bias": np.zeros(1000, np.float32), "head/kernel": np.zeros((48, 1000), np.float32)}
    np.savez(path, **{**arrays_for("vit"), **head})
    with zipfile.ZipFile(path) as archive:
        checksum = archive.getinfo("head/kernel.npy").CRC.to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(checksum, bytes(4)))
    with pytest.raises(CheckpointError, match=r"model\.npz: head/kernel is damaged: Bad CRC-32"):
        inspect_model(str(tmp_path))
