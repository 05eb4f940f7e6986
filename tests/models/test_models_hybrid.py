"""Hybrids of google-research: a ResNet's features under a ViT, against timm with the same arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import preprocessed, spread_out, timm_outputs, worst_cosine, worst_error
from support.npz import arrays_of, to_values
from support.testdata import needs_testdata, photos, trained_vit

from pipeline.models import inspect_model, load_model
from pipeline.models.architecture import Stem
from schemas.errors import CheckpointError

SMALL = {"embed_dim": 96, "depth": 2, "num_heads": 4, "num_classes": 37}

# timm's architecture → the stem that our reading of the arrays must find, and the pixels of a patch.
CASES = {
    "vit_tiny_r_s16_p8_224": (Stem(64, ()), 32),
    "vit_small_r26_s32_224": (Stem(64, (2, 2, 2, 2)), 32),
    "vit_base_r50_s16_224": (Stem(64, (3, 4, 9)), 16),
    "vit_large_r50_s32_224": (Stem(64, (3, 4, 6, 3)), 32),
}


def reference(name: str, **args: Any) -> Any:
    import timm

    model = timm.create_model(name, pretrained=False, **{**SMALL, **args}).eval()
    spread_out(model, seed=0)
    return model


def pixels_at(side: int) -> torch.Tensor:
    pixels, _ = preprocessed(trained_vit(), photos(1), size={"height": side, "width": side})
    return pixels


def assert_same(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    for got, wanted in ((ours.cls, theirs.cls), (ours.pooled, theirs.pooled), (ours.logits, theirs.logits)):
        assert got is not None
        assert worst_cosine(got, wanted) > (0.99999 if dtype == torch.float32 else 0.999)
        if dtype == torch.float32:
            assert worst_error(got, wanted) < 1e-4


@needs_testdata
@pytest.mark.parametrize("name", CASES)
def test_matches_timm(name: str, tmp_path: Path) -> None:
    theirs = reference(name)
    np.savez(tmp_path / "model.npz", **arrays_of(theirs))
    info = inspect_model(str(tmp_path))
    stem, patch = CASES[name]
    assert info.family == "hybrid vit"
    assert info.network.stem == stem
    assert info.network.patch_size == (patch, patch)
    assert info.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    pixels = pixels_at(224)
    expected = timm_outputs(theirs, to_values(pixels))
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(load_model(info, dtype=dtype)(pixels), expected, dtype)


@needs_testdata
@pytest.mark.parametrize("side", [96, 288])
def test_matches_timm_at_another_resolution(side: int, tmp_path: Path) -> None:
    """timm resizes positions otherwise than google-research, so it is given those that google-research makes."""
    from scipy.ndimage import zoom

    theirs = reference("vit_small_r26_s32_224")
    np.savez(tmp_path / "model.npz", **arrays_of(theirs))
    state, grid = theirs.state_dict(), side // 32
    table = state["pos_embed"].numpy()[0]
    zoomed = zoom(table[1:].reshape(7, 7, -1), (grid / 7, grid / 7, 1), order=1).reshape(grid * grid, -1)
    other = reference("vit_small_r26_s32_224", img_size=side)
    other.load_state_dict(state | {"pos_embed": torch.from_numpy(np.concatenate([table[:1], zoomed]))[None]})
    pixels = pixels_at(side)
    info = inspect_model(str(tmp_path), image_size=side)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(load_model(info, dtype=dtype)(pixels), timm_outputs(other, to_values(pixels)), dtype)


def test_padding_is_the_normalised_zero(tmp_path: Path) -> None:
    """A grey picture of the mean value is zero behind normalisation, so that its border differs from nothing."""
    theirs = reference("vit_tiny_r_s16_p8_224")
    np.savez(tmp_path / "model.npz", **arrays_of(theirs))
    model = load_model(inspect_model(str(tmp_path)))
    pixels = torch.full((1, 224, 224, 3), 127, dtype=torch.uint8)
    assert worst_error(model(pixels).pooled, timm_outputs(theirs, to_values(pixels)).pooled) < 1e-4


def test_missing_unit_is_listed(tmp_path: Path) -> None:
    arrays = arrays_of(reference("vit_small_r26_s32_224"))
    del arrays["block3/unit2/gn2/bias"]
    arrays["block1/unit1/conv1/kernel"] = arrays["block1/unit1/conv1/kernel"][..., :32]
    np.savez(tmp_path / "model.npz", **arrays)
    with pytest.raises(CheckpointError, match="1 missing: block3/unit2/gn2/bias") as caught:
        inspect_model(str(tmp_path))
    assert "taken for hybrid vit in google-research .npz layout, as it is an .npz with conv_root" in str(caught.value)
    assert "block1/unit1/conv1/kernel: [32, 64, 1, 1], expected [64, 64, 1, 1]" in str(caught.value)
