"""google-research's `.npz`: vision_transformer (ImageNet-21k, AugReg, SAM, GSAM), big_vision and LiT's image towers.

Arrays are in JAX's axis order, heads apart, under one of several prefixes, blocks stacked or not. `normalise` brings
them into torch's order and one spelling. MLPs use the exact GELU, as timm and transformers do with these weights;
flax's own default is the tanh approximation, which stands in towers under `img/`, that only flax runs. Positions are
resized with order 1 and corners kept, as the library does.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.models.architecture import Architecture, HeadInput, Pooled, Positions, Stem
from pipeline.models.formats.format import Config, Format, Shapes, Spelling
from schemas.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

PREFIXES = ("opt/target/img/", "opt/target/", "params/img/", "params/", "img/", "")
BLOCK = "Transformer/encoderblock_{i}/"

# The architecture in a file's name → width, depth, and pixels of a patch.
SIZES = {
    "Ti_16": (192, 12, 16),
    "S_16": (384, 12, 16),
    "S_32": (384, 12, 32),
    "B_8": (768, 12, 8),
    "B_16": (768, 12, 16),
    "B_32": (768, 12, 32),
    "L_16": (1024, 24, 16),
    "L_32": (1024, 24, 32),
    "H_14": (1280, 32, 14),
    "R_Ti_16": (192, 12, 32),
    "R26_S_32": (384, 12, 32),
    "R26_B_32": (768, 12, 32),
    "R50_B_16": (768, 12, 16),
    "R50_L_32": (1024, 24, 32),
    "Mixer_B_16": (768, 12, 16),
    "Mixer_B_32": (768, 12, 32),
    "Mixer_L_16": (1024, 24, 16),
    "LiT_B16B": (768, 12, 16),
    "LiT_B16B_2": (768, 12, 16),
    "LiT_L16L": (1024, 24, 16),
    "LiT_L16S": (1024, 24, 16),
    "LiT_L16Ti": (1024, 24, 16),
}


def prefix_of(names: Mapping[str, Any]) -> str:
    """What stands before `embedding/kernel`, in a Mixer before `stem/kernel`."""
    found = [prefix for prefix in PREFIXES for name in ("embedding", "stem") if f"{prefix}{name}/kernel" in names]
    return found[0] if found else ""


def normalise(arrays: Mapping[str, "np.ndarray[Any, Any]"]) -> dict[str, "np.ndarray[Any, Any]"]:
    """The image tower's arrays in torch's axis order, without prefix, one set of names for each block."""
    prefix, out = prefix_of(arrays), dict[str, Any]()
    for full_name, array in arrays.items():
        name = full_name.removeprefix(prefix)
        if full_name.startswith(prefix) and not name.startswith(("opt/", "txt/", "state/")):
            out |= in_torch_order(name, array)
    return out


def normalise_text(arrays: Mapping[str, "np.ndarray[Any, Any]"]) -> dict[str, "np.ndarray[Any, Any]"]:
    """The text tower's arrays likewise, under `txt/`, and the scale `t` and bias `b` of the cosines."""
    prefix, out = prefix_of(arrays).removesuffix("img/"), dict[str, Any]()
    for full_name, array in arrays.items():
        name = full_name.removeprefix(prefix)
        if full_name.startswith(prefix) and (name.startswith("txt/") or name in ("t", "b")):
            out |= in_torch_order(name, array)
    return out


def in_torch_order(name: str, array: "np.ndarray[Any, Any]") -> dict[str, "np.ndarray[Any, Any]"]:
    """One array, or one for each block where they are stacked."""
    stacked = re.match(r"(.*/encoderblock)/(.*)", name)
    if stacked is None:
        return {name: _in_torch_order(name, array)}
    return {f"{stacked[1]}_{i}/{stacked[2]}": _in_torch_order(name, one) for i, one in enumerate(array)}


def _in_torch_order(name: str, array: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    if re.search(r"(query|key|value)/kernel$", name):  # (D, heads, head_dim) → (heads · head_dim, D)
        return array.reshape(array.shape[0], -1).T
    # (heads, head_dim, D) → (D, heads · head_dim)
    if name.endswith(("out/kernel", "attention_block/dense_layer/kernel")):
        return array.reshape(-1, array.shape[-1]).T
    if name.endswith("kernel"):  # HWIO → OIHW, and (in, out) → (out, in)
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    if re.search(r"(query|key|value)/bias$", name):
        return array.reshape(-1)
    return array


def _trained_size(file_name: str, side: int, patch: tuple[int, int]) -> tuple[int, int]:
    """`side` patches each way; where the name says a size that is no multiple of a patch (So400m/14 at 384), that."""
    told = [int(number) for number in re.findall(r"_(\d{3})(?=[_.])", file_name)]
    odd = next((size for size in told if size // patch[0] == side == size // patch[1]), None)
    return (odd, odd) if odd else (side * patch[0], side * patch[1])


def architecture(config: Config, shapes: Shapes, stem: Stem | None = None) -> Architecture:
    """From the arrays alone; checked against the file's name where that says something."""
    width, _, *kernel = shapes["embedding/kernel"]
    patch = [side * (stem.stride if stem else 1) for side in kernel]
    depth = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"Transformer/encoderblock_(\d+)/", name)))
    prefix = prefix_of(config["raw_shapes"])
    attention = {name: shape for name, shape in config["raw_shapes"].items() if name.endswith("query/kernel")}
    heads = next(shape[-2] for name, shape in attention.items() if name.startswith(f"{prefix}Transformer/"))
    rows = positions_in(shapes)
    class_token = "cls" in shapes
    # big_vision adds positions before CLS (DeiT-3), so that they are as many as patches.
    positions: Positions = "all" if class_token and round(rows**0.5) ** 2 != rows else "patches"
    side = round((rows - (positions == "all")) ** 0.5)
    shared = prefix.endswith("img/")
    pooled, head_input = read_out(shapes, class_token, shared)
    classes = shapes.get("head/kernel", (0,))[0]
    size = _trained_size(config["file_name"], side, (patch[0], patch[1]))
    check_name(config["file_name"], (width, depth, patch[0]), size)
    return Architecture(
        network="vit",
        width=width,
        depth=depth,
        heads=heads,
        mlp_width=next(shape[0] for name, shape in shapes.items() if name.endswith("Dense_0/kernel")),
        patch_size=(patch[0], patch[1]),
        trained_size=size,
        epsilon=1e-6,
        activation="gelu_tanh" if shared else "gelu",
        class_token=class_token,
        positions=positions,
        position_resize="bilinear_corners",
        pooled=pooled,
        projection_width=classes if shared else shapes.get("pre_logits/kernel", (0,))[0],
        head_input=head_input,
        num_labels=0 if shared else classes,
        stem=stem,
    )


def positions_in(shapes: Shapes) -> int:
    """Rows of the position table. Raises ValueError where there is none, as with big_vision's `posemb="sincos2d"`: for
    how many patches its positions are computed stands nowhere in the file."""
    old_name = "Transformer/posembed_input/pos_embedding"
    rows = (shapes.get("pos_embedding") or shapes.get(old_name) or (1, 0))[1]
    if rows == 0:
        raise ValueError(
            f"neither pos_embedding nor {old_name} is there; positions that big_vision computes (sincos2d) must be "
            "added as pos_embedding"
        )
    return rows


def read_out(shapes: Shapes, class_token: bool, shared: bool) -> tuple[Pooled, HeadInput]:
    """`pre_logits` is a pooler on CLS, without it on the mean, that the head reads; big_vision pools by attention or by
    mean.

    In a tower `shared` with text the head, if there is one, is the projection into the common space.
    """
    head = "head/kernel" in shapes
    if shared and class_token:
        return "projected_cls" if head else "cls", "none"
    if "pre_logits/kernel" in shapes:
        return "pooler", "pooled" if head else "none"
    if "MAPHead_0/probe" in shapes:
        return "attention_pool", "pooled" if head else "none"
    if class_token:
        return "mean_patch_tokens", "cls" if head else "none"
    return "mean_patch_tokens", "pooled" if head else "none"


def check_name(file_name: str, found: tuple[int, int, int], size: tuple[int, int]) -> None:
    """Raise CheckpointError where the file's name says another width, depth, patch or resolution than was `found`."""
    short = re.sub(r"^(R\d*)\+", r"\1_", file_name.replace("ViT-", "")).removeprefix("ViT_")
    name = re.split(r"[-.]", re.sub(r"^(Mixer|LiT)-", r"\1_", short))[0]
    said = SIZES.get(name)
    if said is not None and said != found:
        raise CheckpointError(
            f"{file_name}: the name says width {said[0]}, depth {said[1]}, patch {said[2]}, but the arrays are of "
            f"width {found[0]}, depth {found[1]}, patch {found[2]}; rename the file or fetch it again"
        )
    resolution = re.search(r"res_(\d+)|-(\d{3})\.npz$", file_name)
    if said is not None and resolution is not None and int(resolution[1] or resolution[2]) != size[0]:
        raise CheckpointError(
            f"{file_name}: the name says {resolution[1] or resolution[2]} pixels, but the arrays are for "
            f"{size[0]}×{size[1]}; rename the file or fetch it again"
        )


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """flax renumbered the modules of a block between vision_transformer and big_vision."""
    new = any("MultiHeadDotProductAttention_0" in name and name.startswith("Transformer") for name in shapes)
    attention, norm2, mlp = (0, 1, 0) if new else (1, 2, 3)
    heads = f"{BLOCK}MultiHeadDotProductAttention_{attention}/"
    positions = "pos_embedding" if "pos_embedding" in shapes else "Transformer/posembed_input/pos_embedding"
    pool = "MAPHead_0/"
    modules: dict[str, str | tuple[str, ...]] = {
        "patch": "embedding",
        "blocks.{i}.qkv": tuple(f"{heads}{name}" for name in ("query", "key", "value")),
        "blocks.{i}.out": f"{heads}out",
        "blocks.{i}.fc1": f"{BLOCK}MlpBlock_{mlp}/Dense_0",
        "blocks.{i}.fc2": f"{BLOCK}MlpBlock_{mlp}/Dense_1",
        "pooler": "pre_logits",
        "head": "head",
        "projection": "head",
        "attention_pool.qkv": tuple(
            f"{pool}MultiHeadDotProductAttention_0/{each}" for each in ("query", "key", "value")
        ),
        "attention_pool.out": f"{pool}MultiHeadDotProductAttention_0/out",
        "attention_pool.fc1": f"{pool}MlpBlock_0/Dense_0",
        "attention_pool.fc2": f"{pool}MlpBlock_0/Dense_1",
    }
    norms = {
        "blocks.{i}.norm1": f"{BLOCK}LayerNorm_0",
        "blocks.{i}.norm2": f"{BLOCK}LayerNorm_{norm2}",
        "norm": "Transformer/encoder_norm",
        "attention_pool.norm": f"{pool}LayerNorm_0",
    }
    return {
        "cls_token": "cls",
        "positions": positions,
        "attention_pool.probe": f"{pool}probe",
        **in_flax(modules, norms),
    }


def in_flax(modules: Mapping[str, str | tuple[str, ...]], norms: Mapping[str, str]) -> dict[str, Any]:
    """Spelling of weights and biases, which flax calls `kernel` (in a norm `scale`) and `bias`."""
    spelling: dict[str, str | tuple[str, ...]] = {}
    for weight, rows in (("kernel", modules), ("scale", norms)):
        for ours, theirs in rows.items():
            for parameter, suffix in (("weight", weight), ("bias", "bias")):
                spelling[f"{ours}.{parameter}"] = (
                    f"{theirs}/{suffix}" if isinstance(theirs, str) else tuple(f"{name}/{suffix}" for name in theirs)
                )
    return spelling


def recognise(config: Config, shapes: Shapes) -> str:
    """An `.npz` with a ViT's patch embedding and blocks."""
    if "raw_shapes" not in config or "embedding/kernel" not in shapes or "conv_root/kernel" in shapes:
        return ""
    has_blocks = any(name.startswith("Transformer/encoderblock") for name in shapes)
    return "it is an .npz with embedding/kernel and Transformer/encoderblock" if has_blocks else ""


FORMAT = Format(
    family="vit",
    layout="google-research .npz",
    examples="gs://vit_models/augreg/Ti_16-i21k-300ep-….npz, gs://vit_models/imagenet21k/ViT-L_16.npz",
    test="tests/models/test_models_npz.py",
    recognise=recognise,
    architecture=architecture,
    spell=spell,
    ignored=(r"(opt|state)/.*", r"step", r"[tb]"),
)
