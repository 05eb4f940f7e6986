"""MLP-Mixer of google-research against timm with the same arrays; what it does not have is said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import preprocessed, spread_out, timm_outputs, worst_cosine, worst_error
from support.npz import mixer_arrays_of, to_values
from support.testdata import needs_testdata, photos, trained_vit

from pipeline.models import inspect_model, load_model
from pipeline.opening import resolve_job
from schemas.errors import CheckpointError, SpecError
from schemas.spec import build_spec


def reference(**args: Any) -> Any:
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(patch_size=16, **{"embed_dim": 96, "num_blocks": 3, "num_classes": 37, **args}).eval()
    spread_out(model, seed=0)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    theirs, path = reference(), tmp_path_factory.mktemp("mixer") / "model.npz"
    np.savez(path, **mixer_arrays_of(theirs))
    return theirs, path


@needs_testdata
@pytest.mark.parametrize("side", [224, 96])
def test_matches_timm(side: int, tmp_path: Path) -> None:
    theirs = reference(img_size=side)
    np.savez(tmp_path / "model.npz", **mixer_arrays_of(theirs))
    info = inspect_model(str(tmp_path))
    assert (info.family, info.pooled, info.has_cls) == ("mixer", "mean_patch_tokens", False)
    assert info.image_size == (side, side)
    pixels, _ = preprocessed(trained_vit(), photos(2), size={"height": side, "width": side})
    expected = timm_outputs(theirs, to_values(pixels))
    for dtype in (torch.float32, torch.bfloat16):
        ours = load_model(info, dtype=dtype)(pixels)
        assert ours.cls is None
        assert ours.logits is not None
        for got, wanted in ((ours.pooled, expected.pooled), (ours.logits, expected.logits)):
            assert worst_cosine(got, wanted) > (0.99999 if dtype == torch.float32 else 0.999)
            if dtype == torch.float32:
                assert worst_error(got, wanted) < 1e-4


def test_cls_is_refused_before_anything_starts(saved: tuple[Any, Path]) -> None:
    values = {"sources": ("photos",), "model": str(saved[1]), "out": "out"}
    with pytest.raises(SpecError, match="has no CLS token; ask for --features pooled") as caught:
        resolve_job(build_spec({**values, "features": ["cls", "pooled"]}))
    assert caught.value.exit_code == 2
    assert resolve_job(build_spec(values)).wanted.features == ("pooled",)


def test_another_resolution_is_refused(saved: tuple[Any, Path]) -> None:
    with pytest.raises(CheckpointError, match="runs at 224×224 only"):
        inspect_model(str(saved[1]), image_size=256)


def test_missing_array_is_listed(saved: tuple[Any, Path], tmp_path: Path) -> None:
    arrays = mixer_arrays_of(saved[0])
    del arrays["MixerBlock_1/token_mixing/Dense_1/bias"]
    np.savez(tmp_path / "model.npz", **arrays)
    with pytest.raises(CheckpointError, match="1 missing: MixerBlock_1/token_mixing/Dense_1/bias") as caught:
        inspect_model(str(tmp_path))
    assert "taken for mixer" in str(caught.value)
    del arrays["MixerBlock_0/token_mixing/Dense_0/kernel"]
    np.savez(tmp_path / "model.npz", **arrays)
    with pytest.raises(CheckpointError, match="the sizes of this MLP-Mixer cannot be read"):
        inspect_model(str(tmp_path))
