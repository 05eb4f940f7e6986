"""google-research `.npz`: every spelling gives what timm computes with the same arrays."""

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
from support.testdata import needs_testdata, photos, trained_vit

from pipeline.models import Outputs, inspect_model, load_model
from schemas.errors import CheckpointError

Arrays = dict[str, np.ndarray[Any, Any]]


def arrays_of(model: Any) -> Arrays:
    """timm's ViT in the names and axis order of vision_transformer."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    out = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    if "head.weight" in state:
        out |= {"head/kernel": state["head.weight"].T, "head/bias": state["head.bias"]}
    for i in range(len(model.blocks)):
        theirs, ours = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        for norm, number in (("norm1", 0), ("norm2", 2)):
            out[f"{theirs}LayerNorm_{number}/scale"] = state[f"{ours}{norm}.weight"]
            out[f"{theirs}LayerNorm_{number}/bias"] = state[f"{ours}{norm}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for name, weight, bias in zip(
            ("query", "key", "value"),
            np.split(state[f"{ours}attn.qkv.weight"], 3),
            np.split(state[f"{ours}attn.qkv.bias"], 3),
            strict=True,
        ):
            out[f"{attention}{name}/kernel"] = weight.T.reshape(width, heads, -1)
            out[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
        out[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(heads, -1, width)
        out[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for dense, layer in enumerate(("fc1", "fc2")):
            out[f"{theirs}MlpBlock_3/Dense_{dense}/kernel"] = state[f"{ours}mlp.{layer}.weight"].T
            out[f"{theirs}MlpBlock_3/Dense_{dense}/bias"] = state[f"{ours}mlp.{layer}.bias"]
    return out


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
    "LiT": lambda arrays: (
        with_prefix("params/img/")(renumbered(arrays))
        | {"params/txt/Embed_0/embedding": np.zeros((3, 4), np.float32), "params/t": np.zeros(1, np.float32)}
    ),
    "stacked": lambda arrays: with_prefix("params/")(stacked(renumbered(arrays))),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_timm_checkpoint(
        tmp_path_factory.mktemp("timm"), "vit_base_patch16_224", embed_dim=96, depth=3, num_heads=4, num_classes=37
    )


def to_values(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels / 127.5 - 1).permute(0, 3, 1, 2)


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


def test_positions_are_zoomed_as_google_research_does(reference: Any, tmp_path: Path) -> None:
    from scipy.ndimage import zoom

    np.savez(tmp_path / "model.npz", **arrays_of(reference))
    pixels = torch.randint(0, 256, (1, 320, 320, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    table = reference.pos_embed.detach().numpy()[0]
    grid = zoom(table[1:].reshape(14, 14, -1), (20 / 14, 20 / 14, 1), order=1).reshape(400, -1)
    bigger = make_timm_checkpoint(
        tmp_path / "big", "vit_base_patch16_224", embed_dim=96, depth=3, num_heads=4, num_classes=37, img_size=320
    )
    state = reference.state_dict() | {"pos_embed": torch.from_numpy(np.concatenate([table[:1], grid]))[None]}
    bigger.load_state_dict(state)
    ours = load_model(inspect_model(str(tmp_path / "model.npz"), image_size=320))(pixels)
    assert_equal(ours, timm_outputs(bigger, to_values(pixels)))


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
    files = photos()[:60]
    pixels, _ = preprocessed(trained_vit(), files)
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


# Published sizes: name in timm → parameters, as the table of google-research gives them.
SIZES = {
    "vit_tiny_patch16_224": ("Ti_16", 5_717_416),
    "vit_small_patch16_224": ("S_16", 22_050_664),
    "vit_base_patch16_224": ("B_16", 86_567_656),
    "vit_large_patch16_224": ("L_16", 304_326_632),
    "vit_huge_patch14_224": ("H_14", 632_045_800),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_exact(name: str) -> None:
    import timm

    from pipeline.models.architecture import parameter_count, tensor_shapes
    from pipeline.models.formats import npz_vit

    file_name, parameters = SIZES[name]
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    if name == "vit_huge_patch14_224":
        model.reset_classifier(1000)
    stand_in = torch.nn.Module.state_dict(model)
    raw = arrays_of_shapes(stand_in, model)
    shapes = {key: array.shape for key, array in npz_vit.normalise(raw).items()}
    config = {"raw_shapes": {key: array.shape for key, array in raw.items()}, "file_name": f"{file_name}-i21k.npz"}
    assert parameter_count(tensor_shapes(npz_vit.architecture(config, shapes))) == parameters
    with pytest.raises(CheckpointError, match="the name says width"):
        npz_vit.architecture({**config, "file_name": "B_32-i21k.npz"}, shapes)


def arrays_of_shapes(state: dict[str, torch.Tensor], model: Any) -> Arrays:
    """`arrays_of` for a model without storage."""

    class Shaped:
        embed_dim, blocks = model.embed_dim, model.blocks

        def state_dict(self) -> dict[str, Any]:
            return {name: torch.zeros(1).expand(value.shape) for name, value in state.items()}

    return arrays_of(Shaped())


def test_refusals(reference: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    arrays = arrays_of(reference)
    np.savez(path, **arrays)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5000])
    with pytest.raises(CheckpointError, match=f"truncated.*{len(whole) - 5000} bytes"):
        inspect_model(str(path))
    np.savez(path, **arrays, secret=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CheckpointError, match="secret is object"):
        inspect_model(str(path))
    np.savez_compressed(path, **{name: np.zeros_like(array) for name, array in arrays.items()})
    with pytest.raises(CheckpointError, match="unpacks to"):
        inspect_model(str(path))
    del arrays["Transformer/encoderblock_1/LayerNorm_2/bias"]
    np.savez(path, **arrays)
    with pytest.raises(CheckpointError, match="1 missing: Transformer/encoderblock_1/LayerNorm_2/bias"):
        inspect_model(str(path))
