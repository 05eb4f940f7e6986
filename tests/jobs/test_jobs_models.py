"""`models`: every fact against the reference library, and the cost against torch's own count."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import lit
from support.checkpoints import KINDS, OTHER_KINDS, make_checkpoint
from support.npz import arrays_of, mixer_arrays_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jobs.cli import run_command
from jobs.models import heads
from pipeline.models import inspect_model, load_model
from pipeline.models.architecture import parameter_count
from pipeline.models.cost import forward_flop
from pipeline.models.prefix import prefix_suffices


def described(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run_command(["models", *map(str, arguments), "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


@pytest.mark.parametrize("kind", KINDS | OTHER_KINDS)
def test_cost_and_parameters(kind: str, tmp_path: Path) -> None:
    """FLOP exactly as FlopCounterMode counts the matrix products; parameters as transformers counts them."""
    folder = make_checkpoint(tmp_path / kind, kind)
    for size in (224, 96) if kind == "vit" else (224,):
        info = inspect_model(str(folder), image_size=size)
        model = load_model(info, packed=False)
        # The fused kernel for CPUs is one that FlopCounterMode does not know.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            # With every token read: for CLS alone the last block computes less.
            model(torch.zeros(1, size, size, 3, dtype=torch.uint8), ["patches"])
        assert forward_flop(info.network, info.image_size) == pytest.approx(counter.get_total_flops(), rel=1e-6)
    if prefix_suffices(info.network, frozenset({"cls"})):
        less = load_model(info, packed=False, outputs=("cls",))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            less.trunk(torch.zeros(1, size, size, 3, dtype=torch.uint8), whole=False)
        spared = forward_flop(info.network, info.image_size) - forward_flop(
            info.network, info.image_size, prefix_only=True
        )
        with FlopCounterMode(display=False) as whole, sdpa_kernel(SDPBackend.MATH):
            less.trunk(torch.zeros(1, size, size, 3, dtype=torch.uint8))
        assert spared == pytest.approx(whole.get_total_flops() - counter.get_total_flops(), rel=1e-6)
    assert info.parameters == parameter_count(info.network)


@pytest.mark.parametrize("kind", ["r26", "root", "mixer"])
def test_cost_of_hybrids_and_mixers(kind: str, tmp_path: Path) -> None:
    import timm
    from timm.models.mlp_mixer import MlpMixer

    small = {"embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 7}
    if kind == "mixer":
        arrays = mixer_arrays_of(MlpMixer(patch_size=16, embed_dim=48, num_blocks=2, num_classes=7))
    else:
        name = {"r26": "vit_small_r26_s32_224", "root": "vit_tiny_r_s16_p8_224"}[kind]
        arrays = arrays_of(timm.create_model(name, pretrained=False, **small))
    np.savez(tmp_path / "model.npz", **arrays)
    info = inspect_model(str(tmp_path))
    model = load_model(info, packed=False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 224, 224, 3, dtype=torch.uint8), ["patches"])
    assert forward_flop(info.network, info.image_size) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_text_tower_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    np.savez(tmp_path / "LiT-X.npz", **lit.random_pair("bert"))
    facts = described(capsys, tmp_path / "LiT-X.npz")
    assert facts["text_tower"] == "3 layers, 64 wide, 1 heads, 16 tokens of 15"
    assert facts["labels"] == "none"
    assert facts["heads"] == "projection 40"


@pytest.mark.parametrize(
    ("kind", "unused"),
    [("vit-classifier", ()), ("vit", ()), ("beit-classifier", ()), ("beit-mim", ("mask_token",)), ("siglip", ())],
)
def test_parameters_are_those_of_transformers(kind: str, unused: tuple[str, ...], tmp_path: Path) -> None:
    import transformers

    folder = make_checkpoint(tmp_path / kind, kind)
    model = getattr(transformers, (KINDS | OTHER_KINDS)[kind].saved).from_pretrained(folder)
    theirs = sum(p.numel() for name, p in model.named_parameters() if not name.endswith(unused or ("\n",)))
    assert inspect_model(str(folder)).parameters == theirs


def test_what_is_said_of_a_classifier(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "beit", "beit-classifier")
    facts = described(capsys, folder)
    info = inspect_model(str(folder))
    assert facts["family"] == "beit (BeitForImageClassification, Hugging Face layout)"
    assert facts["size"] == "4 layers, 96 wide, 4 heads, MLP 192, patch 16x16"
    assert (facts["input"], facts["trained_at"]) == ("224x224", "224x224")
    assert facts["preprocessing"]["resize"] == [224, 224]
    assert facts["features"] == "cls 96, pooled 96 (layernormed_mean_patch_tokens), patches 196 x 96"
    assert facts["heads"] == "classifier of 37 classes, reads pooled"
    assert facts["labels"].startswith("37 (LABEL_0, LABEL_1, LABEL_2")
    assert facts["parameters"] == info.parameters
    assert facts["digest"] == info.digest
    assert len(facts["digest"]) == 64
    (tmp_path / "names").write_text("\n".join(f"kind {i}" for i in range(37)))
    larger = described(capsys, folder, "--image-size", "224x320", "--label-file", tmp_path / "names")
    assert (larger["input"], larger["trained_at"]) == ("224x320", "224x224")
    assert larger["features"].endswith("patches 280 x 96")
    assert larger["labels"].startswith("37 (kind 0,")
    assert larger["gflop_an_image"] >= facts["gflop_an_image"]


def test_heads(tmp_path: Path) -> None:
    expected = {
        "vit": ["pooler 96"],
        "beit-mim": ["codebook of 8,192 visual tokens"],
        "beit": [],
        "deit-distilled": ["classifier of 37 classes, reads CLS, and a second one the distillation token"],
        "dinov2-classifier": ["classifier of 37 classes, reads CLS beside the mean of the patches"],
        "siglip": ["attention pool"],
        "clip-projection": ["projection 512"],
    }
    found = {kind: heads(inspect_model(str(make_checkpoint(tmp_path / kind, kind))).network) for kind in expected}
    assert found == expected


def test_visual_tokens_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "beit", "beit-mim")
    plain, normed = described(capsys, folder), described(capsys, folder, "--beit-final-norm")
    assert plain["features"].endswith("patches 196 x 96, visual_tokens 14x14")
    assert "pooled 96 (mean_patch_tokens)" in normed["features"]
    assert (plain["digest"], plain["parameters"]) == (normed["digest"], normed["parameters"])
