"""Exporting what only google-research has: a hybrid, a Mixer and a LiT, each from a single `.npz`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import lit
from support.checkpoints import spread_out
from support.npz import arrays_of, mixer_arrays_of

from pipeline.models import inspect_model, load_model
from pipeline.predictors.triton_repository import Serving, export_triton

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 7}


def arrays_for(kind: str) -> Any:
    import timm
    from timm.models.mlp_mixer import MlpMixer

    if kind == "lit":
        return lit.random_pair("bert")
    if kind == "mixer":
        model = MlpMixer(patch_size=16, img_size=64, embed_dim=48, num_blocks=2, num_classes=7)
    else:
        model = timm.create_model("vit_small_r26_s32_224", pretrained=False, img_size=64, **SMALL)
    spread_out(model.eval(), seed=0)
    return (mixer_arrays_of if kind == "mixer" else arrays_of)(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hybrid", "mixer", "lit"])
def test_a_single_npz_is_exported(kind: str, tmp_path: Path) -> None:
    import onnxruntime

    np.savez(tmp_path / "model.npz", **arrays_for(kind))
    info = inspect_model(str(tmp_path / "model.npz"))
    ours, onnx = export_triton(info, str(tmp_path / "repository"), Serving(max_batch_size=4))
    copied = inspect_model(str(tmp_path / "repository" / ours / "1" / "checkpoint"))
    assert copied.digest == info.digest
    session = onnxruntime.InferenceSession(str(tmp_path / "repository" / onnx / "1" / "model.onnx"))
    pixels = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    (pooled,) = session.run(["pooled"], {"pixels": pixels})
    expected = load_model(info)(torch.from_numpy(pixels)).pooled.numpy()
    assert np.abs(pooled - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())
