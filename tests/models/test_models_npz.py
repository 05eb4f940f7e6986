"""google-research `.npz`: every spelling gives what timm computes with the same arrays."""

import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import (
    make_timm_checkpoint,
    preprocessed,
    saved_tensors,
    timm_outputs,
    worst_cosine,
    worst_error,
)
from support.npz import Arrays, Shaped, arrays_of, mixer_arrays_of, to_values
from support.testdata import needs_testdata, photos, trained_vit

from pipeline.models import Outputs, inspect_model, load_model
from pipeline.models.architecture import Architecture, parameter_count
from pipeline.models.families import recognise
from pipeline.models.formats import npz_vit
from pipeline.models.remap import check, plan
from schemas.errors import CheckpointError


def renumbered(arrays: Arrays) -> Arrays:
    """As newer flax numbers the modules."""
    pairs = [("Attention_1", "Attention_0"), ("LayerNorm_2", "LayerNorm_1"), ("MlpBlock_3", "MlpBlock_0")]
    out = arrays
    for old, new in pairs:
        out = {name.replace(old, new): array for name, array in out.items()}
    return out


def stacked(arrays: Arrays) -> Arrays:
    """The blocks of each kind in one array."""
    blocks = [name for name in arrays if "encoderblock_0/" in name]
    depth = sum(name.endswith("LayerNorm_0/scale") for name in arrays)
    rest = {name: array for name, array in arrays.items() if "encoderblock_" not in name}
    return rest | {
        name.replace("encoderblock_0", "encoderblock"): np.stack(
            [arrays[name.replace("encoderblock_0", f"encoderblock_{i}")] for i in range(depth)]
        )
        for name in blocks
    }


def in_bfloat16(arrays: Arrays) -> Arrays:
    """The upper halves of float32, which NumPy knows only as raw bytes."""
    return {name: (array.view(np.uint32) >> 16).astype(np.uint16).view("V2") for name, array in arrays.items()}


def with_prefix(prefix: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {f"{prefix}{name}": array for name, array in arrays.items()}


VARIANTS: dict[str, Callable[[Arrays], Arrays]] = {
    "plain": lambda arrays: arrays,
    "renumbered": renumbered,
    "opt/target": with_prefix("opt/target/"),
    "params": with_prefix("params/"),
    "stacked": lambda arrays: with_prefix("params/")(stacked(renumbered(arrays))),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_timm_checkpoint(
        tmp_path_factory.mktemp("timm"), "vit_base_patch16_224", embed_dim=96, depth=3, num_heads=4, num_classes=37
    )


def assert_equal(ours: Outputs, theirs: Any) -> None:
    for got, expected in ((ours.cls, theirs.cls), (ours.pooled, theirs.pooled), (ours.logits, theirs.logits)):
        assert got is not None
        assert worst_error(got, expected) < 1e-4
        assert worst_cosine(got, expected) > 0.99999


@needs_testdata
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_spelling_gives_what_timm_computes(variant: str, reference: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    np.savez(path, **VARIANTS[variant](arrays_of(reference)))
    pixels, _ = preprocessed(trained_vit(), photos(2))
    info = inspect_model(str(path))
    expected = timm_outputs(reference, to_values(pixels))
    assert_equal(load_model(info)(pixels), expected)
    low = load_model(info, dtype=torch.bfloat16)(pixels)
    assert low.logits is not None
    assert worst_cosine(low.logits, expected.logits) > 0.999


def test_bfloat16_arrays(reference: Any, tmp_path: Path) -> None:
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays_of(reference).items()}
    rounded = {name: (array.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, array in arrays.items()}
    np.savez(tmp_path / "low.npz", **in_bfloat16(arrays))
    np.savez(tmp_path / "high.npz", **rounded)
    pixels = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    low, high = (load_model(inspect_model(str(tmp_path / name)))(pixels) for name in ("low.npz", "high.npz"))
    assert torch.equal(low.pooled, high.pooled)


def test_pre_logits_are_the_pooler(reference: Any, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(96, 96)).astype(np.float32) / 10
    bias = generator.normal(size=96).astype(np.float32)
    np.savez(tmp_path / "in21k.npz", **arrays_of(reference), **{"pre_logits/kernel": kernel, "pre_logits/bias": bias})
    info = inspect_model(str(tmp_path / "in21k.npz"))
    assert info.pooled == "pooler"
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    outputs = load_model(info)(pixels)
    pooled = torch.tanh(
        timm_outputs(reference, to_values(pixels)).cls @ torch.from_numpy(kernel) + torch.from_numpy(bias)
    )
    assert worst_error(outputs.pooled, pooled) < 1e-4
    assert outputs.logits is not None
    with torch.no_grad():
        assert worst_error(outputs.logits, reference.head(pooled)) < 1e-4


@needs_testdata
@pytest.mark.parametrize("side", [96, 320])
def test_positions_are_zoomed_as_google_research_does(side: int, reference: Any, tmp_path: Path) -> None:
    from scipy.ndimage import zoom

    np.savez(tmp_path / "model.npz", **arrays_of(reference))
    pixels, _ = preprocessed(trained_vit(), photos(2), size={"height": side, "width": side})
    table, rows = reference.pos_embed.detach().numpy()[0], side // 16
    grid = zoom(table[1:].reshape(14, 14, -1), (rows / 14, rows / 14, 1), order=1).reshape(rows * rows, -1)
    other = make_timm_checkpoint(
        tmp_path / "other", "vit_base_patch16_224", embed_dim=96, depth=3, num_heads=4, num_classes=37, img_size=side
    )
    state = reference.state_dict() | {"pos_embed": torch.from_numpy(np.concatenate([table[:1], grid]))[None]}
    other.load_state_dict(state)
    info = inspect_model(str(tmp_path / "model.npz"), image_size=side)
    expected = timm_outputs(other, to_values(pixels))
    assert_equal(load_model(info)(pixels), expected)
    low = load_model(info, dtype=torch.bfloat16)(pixels)
    for got, wanted in ((low.cls, expected.cls), (low.pooled, expected.pooled), (low.logits, expected.logits)):
        assert got is not None
        assert worst_cosine(got, wanted) > 0.999


@pytest.mark.slow
@needs_testdata
def test_trained_vit_is_the_same_in_three_formats(tmp_path: Path) -> None:
    renames = [
        ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("vit.embeddings.position_embeddings", "pos_embed"),
        ("vit.embeddings.cls_token", "cls_token"),
        ("vit.encoder.layer.", "blocks."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("vit.layernorm", "norm"),
        ("classifier", "head"),
    ]
    state = saved_tensors(trained_vit())
    for i in range(12):
        for parameter in ("weight", "bias"):
            parts = [
                state.pop(f"vit.encoder.layer.{i}.attention.attention.{name}.{parameter}")
                for name in ("query", "key", "value")
            ]
            state[f"blocks.{i}.attn.qkv.{parameter}"] = torch.cat(parts)
    for old, new in renames:
        state = {name.replace(old, new): value for name, value in state.items()}
    folder = tmp_path / "timm"
    model = make_timm_checkpoint(folder, "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    model.load_state_dict(state)
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "model.safetensors")
    np.savez(tmp_path / "Ti_16-i21k-300ep--imagenet2012-res_224.npz", **arrays_of(model))
    pixels, _ = preprocessed(trained_vit(), photos()[::4])
    assert len(pixels) == 50
    places = [trained_vit(), folder, next(tmp_path.glob("*.npz"))]
    infos = [inspect_model(str(place)) for place in places]
    assert [info.parameters for info in infos] == [5_717_416] * 3
    first, *others = [load_model(info)(pixels) for info in infos]
    assert first.cls is not None
    assert first.logits is not None
    for other in others:
        assert other.cls is not None
        assert other.logits is not None
        assert worst_error(other.cls, first.cls) < 1e-5
        assert worst_error(other.pooled, first.pooled) < 1e-5
        assert torch.equal(other.logits.argmax(1), first.logits.argmax(1))


# Published sizes with 1,000 classes at 224 pixels: name in timm → name of the file, parameters.
SIZES = {
    "vit_tiny_patch16_224": ("Ti_16", 5_717_416),
    "vit_small_patch16_224": ("S_16", 22_050_664),
    "vit_base_patch16_224": ("B_16", 86_567_656),
    "vit_large_patch16_224": ("L_16", 304_326_632),
    "vit_huge_patch14_224": ("H_14", 632_045_800),
    "vit_tiny_r_s16_p8_224": ("R_Ti_16", 6_337_704),
    "vit_base_r50_s16_224": ("R50+ViT-B_16", 98_659_112),
    "mixer_b16_224": ("Mixer-B_16", 59_880_472),
}

# google-research's table of AugReg: name in timm → name of the file, MiB of the 21k checkpoint, and the parameters of
# the one fine-tuned at 384 pixels.
TABLE = {
    "vit_large_patch16_384": ("L_16", 1243),
    "vit_base_patch16_384": ("B_16", 391),
    "vit_small_patch16_384": ("S_16", 115),
    "vit_large_r50_s32_384": ("R50_L_32", 1337),
    "vit_small_r26_s32_384": ("R26_S_32", 170),
    "vit_tiny_patch16_384": ("Ti_16", 37),
    "vit_base_patch32_384": ("B_32", 398),
    "vit_small_patch32_384": ("S_32", 118),
    "vit_tiny_r_s16_p8_384": ("R_Ti_16", 40),
}


def described(model: Any, file_name: str) -> Architecture:
    """The architecture of a timm model without storage, by its arrays under google-research's names."""
    raw = (mixer_arrays_of if hasattr(model, "stem") else arrays_of)(Shaped(model))
    shapes = {key: array.shape for key, array in npz_vit.normalise(raw).items()}
    config = {"raw_shapes": {key: array.shape for key, array in raw.items()}, "file_name": file_name}
    row, _ = recognise(config, shapes, file_name)
    architecture = row.architecture(config, shapes)
    check(plan(architecture, row.spell(architecture, shapes)), shapes, row.ignored, file_name)
    return architecture


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_exact(name: str) -> None:
    import timm

    file_name, parameters = SIZES[name]
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=1000)
    assert parameter_count(described(model, f"{file_name}.npz")) == parameters
    with pytest.raises(CheckpointError, match="the name says width"):
        described(model, "B_8-i21k.npz")


@pytest.mark.parametrize("name", TABLE)
def test_size_table(name: str) -> None:
    """Exact at 384 pixels with 1,000 classes, and the file of the 21k checkpoint has the published size."""
    import timm

    file_name, mebibytes = TABLE[name]
    with torch.device("meta"):
        tuned = timm.create_model(name, pretrained=False, num_classes=1000)
        first = timm.create_model(name, pretrained=False, num_classes=21_843, img_size=224)
    ours = described(tuned, f"{file_name}-i21k-300ep-lr_0.001--imagenet2012-steps_20k-lr_0.03-res_384.npz")
    assert ours.trained_size == (384, 384)
    assert parameter_count(ours) == sum(parameter.numel() for parameter in tuned.parameters())
    pre_trained = described(first, f"{file_name}-i21k-300ep-lr_0.001.npz")
    assert 4 * parameter_count(pre_trained) / 2**20 == pytest.approx(mebibytes, abs=1)
    with pytest.raises(CheckpointError, match="the name says 224 pixels, but the arrays are for 384×384"):
        described(tuned, f"{file_name}-i21k-300ep-lr_0.001--imagenet2012-steps_20k-lr_0.03-res_224.npz")


@pytest.mark.parametrize(
    ("name", "found", "side", "said"),
    [
        ("ViT-B_16.npz", (768, 12, 16), 384, ""),
        ("ViT-B_16-224.npz", (768, 12, 16), 224, ""),
        ("ViT-B_16-224.npz", (768, 12, 16), 384, "the name says 224 pixels"),
        ("ViT-B_16.npz", (768, 12, 32), 384, "the name says width 768, depth 12, patch 16"),
        ("R50+ViT-B_16.npz", (768, 12, 16), 384, ""),
        ("R50+ViT-B_16.npz", (1024, 24, 32), 384, "the name says width 768"),
        ("R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1.npz", (384, 12, 32), 224, ""),
        ("Mixer-L_16.npz", (1024, 24, 16), 224, ""),
        ("Mixer-L_16.npz", (768, 12, 16), 224, "the name says width 1024"),
        ("LiT-L16S.npz", (1024, 24, 16), 224, ""),
        ("LiT-B16B_2.npz", (1024, 24, 16), 224, "the name says width 768"),
        ("B_16-i21k-300ep--imagenet2012-steps_20k-lr_0.01-res_384.npz", (768, 12, 16), 224, "the name says 384 pixels"),
        ("my-own-640.npz", (48, 2, 8), 224, ""),
    ],
)
def test_names_are_checked(name: str, found: tuple[int, int, int], side: int, said: str) -> None:
    if not said:
        npz_vit.check_name(name, found, (side, side))
        return
    with pytest.raises(CheckpointError, match=said):
        npz_vit.check_name(name, found, (side, side))


def whole_header(shape: tuple[int, ...]) -> bytes:
    """A `.npy` header that says float32 of `shape`."""
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
    return file.getvalue()


def test_refusals(reference: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    arrays = arrays_of(reference)
    np.savez(path, **arrays)
    whole = path.read_bytes()
    for kept in (len(whole) - 5000, len(whole) // 2, 100_000):
        path.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match="truncated") as found:
            inspect_model(str(path))
        assert f"it has {kept}" in str(found.value)
        expected = int(re.findall(r"expected at least (\d+)", str(found.value))[0])
        assert kept < expected <= len(whole)
        assert expected == len(whole) or kept < len(whole) - 5000
    path.write_bytes(b"not an archive at all")
    with pytest.raises(CheckpointError, match=r"no \.npz archive.*21 bytes"):
        inspect_model(str(path))
    middle = whole.index(b"\x93NUMPY", len(whole) // 2) + 5000
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    with pytest.raises(CheckpointError, match="is damaged: Bad CRC-32"):
        load_model(inspect_model(str(path)))
    np.savez(path, **arrays, secret=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CheckpointError, match="secret is object"):
        inspect_model(str(path))
    np.savez_compressed(path, **{name: np.zeros_like(array) for name, array in arrays.items()})
    with pytest.raises(CheckpointError, match="unpacks to"):
        inspect_model(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cls.npy", whole_header((1, 1, 10**9)) + bytes(400))
    with pytest.raises(CheckpointError, match=r"cls says float32 \[1, 1, 1000000000\], which is 4000000000 bytes"):
        inspect_model(str(path))
    del arrays["Transformer/encoderblock_1/LayerNorm_2/bias"]
    np.savez(path, **arrays)
    with pytest.raises(CheckpointError, match="1 missing: Transformer/encoderblock_1/LayerNorm_2/bias"):
        inspect_model(str(path))
