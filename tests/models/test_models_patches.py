"""Patch features and BEiT's visual tokens against the reference libraries, on real photographs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import (
    make_checkpoint,
    make_timm_checkpoint,
    preprocessed,
    reference_outputs,
    timm_outputs,
    timm_preprocessed,
    worst_cosine,
)
from support.testdata import needs_testdata, photos

from pipeline.models import inspect_model, load_model

pytestmark = needs_testdata

# Half the distance between neighbouring float16 numbers, relative; and what float32 sums in another order differ by.
HALF_STEP = 2**-11
FLOAT32_ERROR = 1e-4


def check_patches(folder: Path, pixels: torch.Tensor, expected: torch.Tensor) -> None:
    """`expected` are the patch tokens of the reference, (B, N, D)."""
    info = inspect_model(str(folder))
    down, across = info.network.grid(info.image_size)
    for dtype in (torch.float32, torch.bfloat16):
        got = load_model(info, dtype=dtype)(pixels, ["patches"]).patches
        assert got is not None
        assert got.dtype == torch.float16
        assert got.shape == expected.shape == (len(pixels), down * across, info.hidden_size)
        assert worst_cosine(got.flatten(1), expected.flatten(1)) > (0.99999 if dtype == torch.float32 else 0.999)
        if dtype == torch.float32:
            allowed = HALF_STEP * expected.abs() + FLOAT32_ERROR * max(1.0, float(expected.abs().max()))
            assert bool(((got.float() - expected).abs() <= allowed).all())


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("vit-classifier", 1),
        ("beit", 1),
        ("beit-mim", 1),
        ("deit-distilled", 2),
        ("dinov2-registers", 5),
        ("siglip", 0),
    ],
)
def test_patches_are_those_of_transformers(kind: str, prefix: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / kind, kind)
    pixels, values = preprocessed(folder, photos(2))
    check_patches(folder, pixels, reference_outputs(folder, values).tokens[:, prefix:])


@pytest.mark.parametrize("architecture", ["vit_base_patch14_reg4_dinov2", "beit_base_patch16_224"])
def test_patches_are_those_of_timm(architecture: str, tmp_path: Path) -> None:
    options = {"embed_dim": 96, "depth": 3, "num_heads": 4, "img_size": 224, "num_classes": 0}
    model = make_timm_checkpoint(tmp_path, architecture, **options)
    pixels, values = timm_preprocessed(model, photos(2))
    check_patches(tmp_path, pixels, timm_outputs(model, values).tokens[:, model.num_prefix_tokens :])


@pytest.mark.parametrize("final_norm", [False, True])
def test_visual_tokens_are_those_of_transformers(final_norm: bool, tmp_path: Path) -> None:
    import transformers

    folder = make_checkpoint(tmp_path / "beit", "beit-mim")
    pixels, values = preprocessed(folder, photos(4))
    reference = transformers.BeitForMaskedImageModeling.from_pretrained(folder).eval()
    with torch.no_grad():
        scores = reference(values).logits  # (B, 196, 8192)
    info = inspect_model(str(folder), beit_final_norm=final_norm)
    outputs = load_model(info)(pixels, ["visual_tokens"])
    assert outputs.patches is None
    assert outputs.visual_tokens is not None
    assert outputs.visual_tokens.dtype == torch.int32
    assert torch.equal(outputs.visual_tokens, scores.argmax(-1).int())
    assert len(outputs.visual_tokens.unique()) > 20
    # In bfloat16 the choice may differ where two scores are as good as equal.
    chosen = load_model(info, dtype=torch.bfloat16)(pixels, ["visual_tokens"]).visual_tokens
    assert chosen is not None
    loss = scores.max(-1).values - scores.gather(-1, chosen.long()[..., None])[..., 0]
    assert float(loss.max()) < 0.05 * float(scores.std())
    assert float((chosen == outputs.visual_tokens).float().mean()) > 0.95


def test_nothing_is_computed_that_nobody_asks_for(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "beit", "beit-mim")
    pixels, _ = preprocessed(folder, photos(1))
    outputs = load_model(inspect_model(str(folder)))(pixels)
    assert outputs.patches is None
    assert outputs.visual_tokens is None


def test_only_a_pretraining_head_gives_visual_tokens(tmp_path: Path) -> None:
    info = inspect_model(str(make_checkpoint(tmp_path / "beit", "beit-classifier")))
    assert info.network.visual_tokens == 0
    pretrained = inspect_model(str(make_checkpoint(tmp_path / "mim", "beit-mim")))
    assert (pretrained.network.visual_tokens, pretrained.network.grid(pretrained.image_size)) == (8192, (14, 14))


@pytest.mark.parametrize(("features", "whole"), [(("cls",), False), (("cls", "patches"), True)])
def test_a_job_for_cls_alone_runs_the_short_last_block(features: tuple[str, ...], whole: bool, tmp_path: Path) -> None:
    from pipeline.predictors.batches import Wanted
    from pipeline.predictors.torch_predictor import TorchPredictor

    info = inspect_model(str(make_checkpoint(tmp_path / "vit", "vit-classifier")))
    sizes = {"cls": 96, "patches": (196, 96)}
    wanted = Wanted(features, tuple(sizes[name] for name in features), "float32", 0, (), False)  # type: ignore[misc]
    predictor = TorchPredictor(info, wanted, dtype="float32", batch_size=2)
    asked: list[bool] = []
    trunk = predictor._model.trunk
    trunk.register_forward_pre_hook(lambda _, args: asked.append(args[1]))
    predictor.predict(np.zeros((2, 224, 224, 3), np.uint8))
    assert asked == [whole]
