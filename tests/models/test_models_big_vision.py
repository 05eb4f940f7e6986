"""big_vision's `.npz`: what its ViTs do otherwise than vision_transformer's, against timm with the same arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.checkpoints import spread_out, timm_outputs, worst_error
from support.npz import arrays_of, to_values

from pipeline.models import inspect_model, load_model

SMALL = {"embed_dim": 96, "depth": 2, "num_heads": 4, "num_classes": 37}


def reference(**args: Any) -> Any:
    import timm

    model = timm.create_model("vit_base_patch16_224", pretrained=False, **SMALL, **args).eval()
    spread_out(model, seed=0)
    return model


def noise(side: int = 224) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_pre_logits_without_cls_read_the_mean(tmp_path: Path) -> None:
    """`rep_size` with `pool_type="gap"`: pooled first, then the dense layer and its tanh."""
    theirs = reference(class_token=False, global_pool="avg", fc_norm=False)
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(96, 96)).astype(np.float32) / 10
    bias = generator.normal(size=96).astype(np.float32)
    np.savez(tmp_path / "gap.npz", **arrays_of(theirs), **{"pre_logits/kernel": kernel, "pre_logits/bias": bias})
    info = inspect_model(str(tmp_path / "gap.npz"))
    assert (info.pooled, info.has_cls) == ("pooler", False)
    ours = load_model(info)(noise())
    mean = timm_outputs(theirs, to_values(noise())).tokens.mean(dim=1)
    pooled = torch.tanh(mean @ torch.from_numpy(kernel) + torch.from_numpy(bias))
    assert worst_error(ours.pooled, pooled) < 1e-4
    assert ours.logits is not None
    assert worst_error(ours.logits, theirs.head(pooled)) < 1e-4
