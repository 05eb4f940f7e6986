"""big_vision's `.npz`: what its ViTs do otherwise than vision_transformer's, against timm with the same arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import spread_out, timm_outputs, worst_error
from support.npz import arrays_of, to_values

from pipeline.models import inspect_model, load_model
from schemas.errors import CheckpointError

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


def test_positions_of_the_patches_alone_beside_cls(tmp_path: Path) -> None:
    """`pool_type="tok"`, as the DeiT-3 of its zoo: CLS comes in when the positions are already added."""
    theirs = reference(no_embed_class=True)
    arrays = arrays_of(theirs)
    np.savez(tmp_path / "bv_deit_3_224_1k.npz", **arrays)
    info = inspect_model(str(tmp_path / "bv_deit_3_224_1k.npz"))
    assert (info.network.positions, info.network.trained_size, info.has_cls) == ("patches", (224, 224), True)
    ours, expected = load_model(info)(noise()), timm_outputs(theirs, to_values(noise()))
    for got, wanted in ((ours.cls, expected.cls), (ours.pooled, expected.pooled), (ours.logits, expected.logits)):
        assert got is not None
        assert worst_error(got, wanted) < 1e-4


@pytest.mark.parametrize("class_token", [True, False])
def test_positions_that_are_computed_are_refused(class_token: bool, tmp_path: Path) -> None:
    pooling = {} if class_token else {"global_pool": "avg", "fc_norm": False}
    arrays = arrays_of(reference(class_token=class_token, **pooling))
    table = arrays.pop("Transformer/posembed_input/pos_embedding")
    np.savez(tmp_path / "sincos.npz", **arrays)
    with pytest.raises(CheckpointError, match=r"neither pos_embedding nor .*sincos2d\) must be added") as refused:
        inspect_model(str(tmp_path / "sincos.npz"))
    assert str(tmp_path) in str(refused.value)
    np.savez(tmp_path / "sincos.npz", **arrays, pos_embedding=table)
    assert inspect_model(str(tmp_path / "sincos.npz")).image_size == (224, 224)
