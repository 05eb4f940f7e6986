"""timm's state dicts against timm: every family, on real photographs, and at another resolution."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    Expected,
    make_timm_checkpoint,
    timm_outputs,
    timm_preprocessed,
    worst_cosine,
    worst_error,
)
from support.testdata import needs_testdata, photos
from timm.models import load_state_dict

from pipeline.models import Outputs, inspect_model, load_model
from pipeline.models.weights import find_weights, read_shapes, read_tensors
from schemas.errors import CheckpointError

SMALL = {"embed_dim": 96, "depth": 3, "num_heads": 4}

# Name of the case → architecture and what it is made with. Sizes are small; everything else is the architecture's own.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_base_patch16_224", {**SMALL, "num_classes": 37}),
    "vit-fc-norm": ("vit_base_patch16_224", {**SMALL, "num_classes": 37, "global_pool": "avg"}),
    "vit-gap": ("vit_base_patch16_reg4_gap_256", {**SMALL, "num_classes": 37}),
    "vit-no-classifier": ("vit_base_patch16_224", {**SMALL, "num_classes": 0}),
    "deit": ("deit_base_patch16_224", {**SMALL, "num_classes": 37}),
    "deit-distilled": ("deit_base_distilled_patch16_224", {**SMALL, "num_classes": 37}),
    "deit3": ("deit3_base_patch16_224", {**SMALL, "num_classes": 37}),
    "dino": ("vit_base_patch8_224", {**SMALL, "num_classes": 0, "img_size": 96}),
    "dino-16": ("vit_base_patch16_224.dino", {**SMALL, "num_classes": 0}),
    "mae": ("vit_base_patch16_224.mae", {**SMALL, "num_classes": 0}),
    "dinov2": ("vit_base_patch14_dinov2", {**SMALL, "num_classes": 0, "img_size": 224}),
    "dinov2-registers": ("vit_base_patch14_reg4_dinov2", {**SMALL, "num_classes": 0, "img_size": 224}),
    "dinov2-giant": ("vit_giant_patch14_reg4_dinov2", {**SMALL, "num_classes": 0, "img_size": 224}),
    "clip": ("vit_base_patch16_clip_224", {**SMALL, "num_classes": 0}),
    "clip-classifier": ("vit_base_patch16_clip_quickgelu_224", {**SMALL, "num_classes": 1000}),
    "siglip": ("vit_base_patch16_siglip_224", {**SMALL, "num_classes": 0}),
    "siglip2": ("vit_so400m_patch16_siglip_256", {**SMALL, "num_classes": 0}),
    "siglip-gap": ("vit_base_patch16_siglip_gap_224", {**SMALL, "num_classes": 0}),
    "siglip-384": ("vit_so400m_patch14_siglip_384", {**SMALL, "num_classes": 0}),  # 384 is no multiple of 14
    "so150m": ("vit_so150m_patch16_reg4_map_256", {**SMALL, "num_classes": 37}),
    "hybrid": ("vit_small_r26_s32_224", {**SMALL, "num_classes": 37}),
    "hybrid-root": ("vit_tiny_r_s16_p8_224", {**SMALL, "num_classes": 37}),
    "beit": ("beit_base_patch16_224", {**SMALL, "num_classes": 37}),
    "beitv2": ("beitv2_base_patch16_224", {**SMALL, "num_classes": 37}),
}


def compare(ours: Outputs, theirs: Expected, dtype: torch.dtype, has_cls: bool) -> None:
    assert (ours.cls is not None) == has_cls
    pairs = [
        ("cls", ours.cls, theirs.cls),
        ("pooled", ours.pooled, theirs.pooled),
        ("logits", ours.logits, theirs.logits),
    ]
    for name, got, expected in pairs:
        if expected is None or (name == "cls" and not has_cls):
            assert got is None, name
            continue
        assert got is not None, name
        assert got.shape == expected.shape, name
        assert worst_cosine(got, expected) > (0.99999 if dtype == torch.float32 else 0.999), (name, dtype)
        if dtype == torch.float32:
            assert worst_error(got, expected) < 1e-4, name


@needs_testdata
@pytest.mark.parametrize("case", CASES)
def test_matches_timm(case: str, tmp_path: Path) -> None:
    architecture, args = CASES[case]
    reference = make_timm_checkpoint(tmp_path, architecture, **args)
    pixels, values = timm_preprocessed(reference, photos(2))
    expected = timm_outputs(reference, values)
    info = inspect_model(str(tmp_path))
    assert info.image_size == tuple(values.shape[2:])
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(info, dtype=dtype)
        compare(
            model(pixels), expected, dtype, reference.num_prefix_tokens > reference.__dict__.get("num_reg_tokens", 0)
        )
    full = model.last_hidden_state(pixels) if dtype == torch.float32 else load_model(info).last_hidden_state(pixels)
    assert worst_error(full.flatten(0, 1), expected.tokens.flatten(0, 1)) < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_rope_224",
        "vit_base_patch16_dinov3",
        "vit_pe_core_base_patch16_224",
        "vit_base_patch16_rpn_224",
    ],
)
def test_what_computes_otherwise_than_its_tensors_show_is_refused(name: str, tmp_path: Path) -> None:
    make_timm_checkpoint(tmp_path, "vit_base_patch16_224", **SMALL)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("vit_base_patch16_224", name))
    with pytest.raises(CheckpointError, match=f"{name} is no plain ViT"):
        inspect_model(str(tmp_path))


# A family each at half its size; of these also larger, and not square.
AT_ANOTHER_RESOLUTION = (
    *("vit", "vit-fc-norm", "deit", "deit-distilled", "deit3", "dino-16", "mae", "dinov2", "dinov2-registers"),
    *("dinov2-giant", "clip", "clip-classifier", "siglip", "so150m", "beit", "beitv2"),
)
AT_MANY = ("vit", "deit-distilled", "dinov2-registers", "siglip", "so150m", "beit")


@needs_testdata
@pytest.mark.parametrize(
    ("case", "factors"),
    [
        *((case, (0.5, 0.5)) for case in AT_ANOTHER_RESOLUTION),
        ("hybrid", (6 / 7, 8 / 7)),
        *((case, factors) for case in AT_MANY for factors in ((1.5, 1.5), (1.0, 1.5), (1.5, 0.5))),
    ],
)
def test_matches_timm_at_another_resolution(case: str, factors: tuple[float, float], tmp_path: Path) -> None:
    """timm resizes position embeddings and BEiT's tables by `set_input_size`."""
    architecture, args = CASES[case]
    reference = make_timm_checkpoint(tmp_path, architecture, **args)
    side = reference.patch_embed.img_size[0]
    size = (round(side * factors[0]), round(side * factors[1]))
    reference.set_input_size(img_size=size)
    reference.pretrained_cfg = {**reference.pretrained_cfg, "input_size": (3, *size)}
    pixels, values = timm_preprocessed(reference, photos(2))
    info = inspect_model(str(tmp_path), image_size=size)
    has_cls = reference.num_prefix_tokens > reference.__dict__.get("num_reg_tokens", 0)
    expected = timm_outputs(reference, values)
    for dtype in (torch.float32, torch.bfloat16):
        compare(load_model(info, dtype=dtype)(pixels), expected, dtype, has_cls)


@needs_testdata
@pytest.mark.parametrize("case", ["vit", "dinov2-registers"])
@pytest.mark.parametrize("size", [(336, 336), (224, 308)])
def test_matches_timm_with_dynamic_img_size(case: str, size: tuple[int, int], tmp_path: Path) -> None:
    """The same model of timm at whatever size comes in."""
    architecture, args = CASES[case]
    reference = make_timm_checkpoint(tmp_path, architecture, **args, dynamic_img_size=True)
    patch = reference.patch_embed.patch_size[0]
    size = (size[0] // patch * patch, size[1] // patch * patch)
    reference.pretrained_cfg = {**reference.pretrained_cfg, "input_size": (3, *size)}
    pixels, values = timm_preprocessed(reference, photos(2))
    info = inspect_model(str(tmp_path), image_size=size)
    compare(load_model(info)(pixels), timm_outputs(reference, values), torch.float32, has_cls=True)


@needs_testdata
@pytest.mark.parametrize("classes", [37, 0])
def test_mixer_matches_timm(classes: int, tmp_path: Path) -> None:
    reference = make_timm_checkpoint(tmp_path, "mixer_s32_224", num_classes=classes)
    pixels, values = timm_preprocessed(reference, photos(2))
    info = inspect_model(str(tmp_path))
    assert (info.family, info.layout, info.has_cls) == ("mixer", "timm", False)
    tokens = reference.forward_features(values)
    with torch.no_grad():
        logits = reference.forward_head(tokens) if classes else None
        expected = Expected(tokens[:, 0], reference.forward_head(tokens, pre_logits=True), logits, tokens)
    for dtype in (torch.float32, torch.bfloat16):
        compare(load_model(info, dtype=dtype)(pixels), expected, dtype, has_cls=False)


def test_clip_projection_is_the_image_embedding(tmp_path: Path) -> None:
    reference = make_timm_checkpoint(tmp_path, "vit_base_patch16_clip_224.openai", **SMALL, num_classes=512)
    info = inspect_model(str(tmp_path))
    assert (info.pooled, info.pooled_size, info.num_labels) == ("projected_cls", 512, 0)
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(reference.pretrained_cfg[key]) for key in ("mean", "std"))
    values = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert worst_error(load_model(info)(pixels).pooled, reference(values)) < 1e-4


def test_pth_file(tmp_path: Path) -> None:
    make_timm_checkpoint(tmp_path, "vit_tiny_patch16_224", depth=1, num_classes=3, safetensors=False)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "checkpoint.pth")
    assert inspect_model(str(tmp_path)).num_labels == 3


Dicts = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    "content",
    [
        lambda last, mean: {"epoch": 3, "state_dict": last, "state_dict_ema": mean},
        lambda last, mean: {"model": last, "model_ema": mean, "optimizer": {"state": {}}},
        lambda last, mean: {"model": last, "model_ema": None},
        lambda last, mean: {"state_dict": last, "args": argparse.Namespace(lr=0.1)},
        lambda last, mean: {"state_dict": {f"module.{name}": tensor for name, tensor in last.items()}},
        lambda last, mean: {f"_orig_mod.{name}": tensor for name, tensor in last.items()},
        lambda last, mean: {f"module._orig_mod.{name}": tensor for name, tensor in last.items()},
        lambda last, mean: {f"_orig_mod.module.{name}": tensor for name, tensor in last.items()},
    ],
)
def test_what_a_training_script_saved_loads_as_timm_loads_it(content: Dicts, tmp_path: Path) -> None:
    last = make_timm_checkpoint(tmp_path, "vit_tiny_patch16_224", depth=1, num_classes=3, safetensors=False)
    mean = make_timm_checkpoint(tmp_path / "mean", "vit_tiny_patch16_224", depth=1, num_classes=3, seed=1)
    (tmp_path / "pytorch_model.bin").unlink()
    path = tmp_path / "model_best.pth.tar"
    torch.save(content(last.state_dict(), mean.state_dict()), path)
    last.load_state_dict(load_state_dict(str(path)))
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    logits = load_model(inspect_model(str(tmp_path)))(pixels).logits
    assert logits is not None
    with torch.no_grad():
        assert worst_error(logits, last(((pixels / 255 - 0.5) / 0.5).permute(0, 3, 1, 2))) < 1e-4


LAST, MEAN = torch.tensor([1.0]), torch.tensor([2.0])


def test_the_state_dict_of_a_file_with_several(tmp_path: Path) -> None:
    """In the order in which the running mean goes first; DINO's teacher comes behind everything else."""
    order = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "teacher")
    for start in range(len(order)):
        content = {key: {"w": torch.full((1,), float(order.index(key)))} for key in reversed(order[start:])}
        torch.save({"student": {"w": torch.full((1,), -1.0)}, **content}, tmp_path / "checkpoint.pth")
        assert read_tensors(find_weights(tmp_path)) == {"w": torch.tensor([float(start)])}


@pytest.mark.parametrize(
    ("content", "taken"),
    [
        # torch's AveragedModel, as torchvision's reference script saves it
        ({"model": {"w": LAST}, "model_ema": {"n_averaged": torch.tensor(7), "module.w": MEAN}}, MEAN),
        ({"model": {"w": LAST}, "model_ema": {"decay": 0.99, "module": {"w": MEAN}}}, MEAN),
        ({"model": {"w": LAST}, "model_ema": {}}, LAST),
        ({"model": {"w": LAST}, "model_ema": {"shadow.w": MEAN}}, LAST),
        ({"model": {"w": LAST}, "state_dict_ema": {"shadow.w": MEAN}, "model_ema": {"w": MEAN}}, MEAN),
        ({"state_dict": {"model": {"w": LAST}}}, LAST),
        ({"model_ema": {"w": MEAN}}, MEAN),
        ({"model": {"w": LAST, "relative_position_index": torch.zeros(1, dtype=int)}, "model_ema": {"w": MEAN}}, MEAN),
        ({"w": LAST}, LAST),
    ],
)
def test_a_running_mean_counts_where_it_is_one_of_these_weights(
    content: dict[str, Any], taken: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(content, tmp_path / "checkpoint.pth")
    assert read_tensors(find_weights(tmp_path)) == {"w": taken}
    assert bool(caplog.messages) == ("shadow.w" in str(content) and taken is LAST)
    assert read_shapes(find_weights(tmp_path)) == {"w": (1,)}


@pytest.mark.slow
def test_every_architecture_of_timm_is_described_or_refused() -> None:
    """Heads, epsilon and activation that the tensors do not tell agree with timm for every model that is accepted."""
    import timm

    from pipeline.models.families import recognise
    from pipeline.models.remap import check, plan
    from schemas.errors import CheckpointError

    accepted, refused = [], []
    names = (
        timm.list_models(module="vision_transformer")
        + timm.list_models(module="deit")
        + timm.list_models(module="beit")
        + timm.list_models("vit_*_r*_s*", module="vision_transformer_hybrid")
    )
    for name in names:
        with torch.device("meta"):
            skipped: dict[str, str] = {} if name.startswith("beit") else {"weight_init": "skip"}
            model = timm.create_model(name, pretrained=False, **skipped)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        config = {"architecture": name, "pretrained_cfg": model.pretrained_cfg, "global_pool": model.global_pool}
        try:
            row, _ = recognise(config, shapes, name)
            a = row.architecture(config, shapes)
            check(plan(a, row.spell(a, shapes)), shapes, row.ignored, name)
        except CheckpointError:
            refused.append(name)
            continue
        accepted.append(name)
        assert a == row.architecture({**config, "global_pool": None}, shapes), name
        block = model.blocks[0]
        assert a.heads == block.attn.num_heads, name
        assert a.epsilon == block.norm1.eps, name
        act = block.mlp.act
        theirs = "gelu_tanh" if type(act).__name__ == "GELUTanh" else type(act).__name__
        assert theirs == {"gelu": "GELU", "quick_gelu": "QuickGELU", "silu": "SiLU"}.get(a.activation, a.activation), (
            name
        )
        assert a.depth == len(model.blocks), name
        assert (a.prefix_tokens, a.class_token) == (model.num_prefix_tokens, model.cls_token is not None), name
    assert len(accepted) >= 157, (len(accepted), refused)
