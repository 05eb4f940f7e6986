"""What timm's checkpoints have in common: config.json beside a state dict, and what the state dict does not tell.

config.json is as timm pushes it to the hub: `architecture`, `num_classes`, `global_pool`, `model_args` (where the model
was made with other arguments than its name implies) and `pretrained_cfg`. In its first form what `pretrained_cfg`
holds stood beside the rest. transformers saves a model of timm's in the same layout, and adds its own `model_type`.
"""

import re
from collections.abc import Callable
from typing import Any

from pipeline.models.architecture import Activation
from pipeline.models.formats.format import ACTIVATION_NAMES, Config, Shapes
from schemas.errors import CheckpointError

# The `model_type` of transformers' TimmWrapperModel and TimmWrapperForImageClassification.
WRAPPED = "timm_wrapper"

# What to write where there is none, in the words of an error and of docs/checkpoints.md.
EXAMPLE_CONFIG = (
    '{"architecture": "beit_base_patch16_224", "num_classes": 37, "pretrained_cfg": {"input_size": [3, 224, 224], '
    '"interpolation": "bicubic", "crop_pct": 0.9, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}'
)

# Attention heads by width: a state dict does not show them. Every ViT, DeiT and BEiT of timm follows this, but for
# the few below it.
HEADS = {
    **{width: width // 64 for width in (192, 256, 320, 384, 448, 512, 576, 640, 768, 832, 896, 1024, 1536)},
    **{1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16},
}
# The widths that names of architectures stand for.
_WIDTHS = {"_tiny_": 192, "_small_": 384, "_base_": 768, "_large_": 1024}
OTHER_HEADS = {"vit_giantopt": 16, "vit_base_patch16_gap_224": 16}

# Architectures whose MLP is not the exact GELU.
OTHER_ACTIVATIONS: tuple[tuple[str, Activation], ...] = (
    ("quickgelu", "quick_gelu"),
    (r"patch32_siglip|large_patch16_siglip(_gap)?_512|so400m_patch16_siglip|giantopt", "gelu_tanh"),
)


# Checkpoints, as architecture.tag, trained with QuickGELU, which timm's name of the architecture takes for the exact
# GELU: those with `notes` on it in timm/models/vision_transformer.py.
QUICK_GELU = re.compile(
    r"_clip_.*\.(openai|metaclip_400m|metaclip_2pt5b|dfn5b)$|_patch32_clip_224\.laion400m_e32$"
    r"|_large_patch14_clip_224\.dfn2b$|_huge_patch14_clip_224\.metaclip2_worldwide$"
)


def with_pretrained_cfg(config: Config) -> Config:
    """`config`, which in timm's first form is its own `pretrained_cfg` (`_parse_model_cfg` in timm/models/_hub.py)."""
    if "pretrained_cfg" in config or "architecture" not in config or "model_type" in config:
        return config
    names = {"label_names": config["labels"]} if "labels" in config else {}
    return {**config, "pretrained_cfg": {**config, **names}}


def by_architecture(pattern: str, *tensors: str) -> Callable[[Config, Shapes], str]:
    """A `recognise` for timm's config.json: the architecture's name matches, and these tensors are there."""

    def recognise(config: Config, shapes: Shapes) -> str:
        name = str(config.get("architecture", ""))
        if config.get("model_type", WRAPPED) != WRAPPED or not re.match(pattern, name):
            return ""
        if not all(each in shapes for each in tensors):
            return ""
        return f"config.json says architecture {name!r}"

    return recognise


def settings(config: Config) -> dict[str, Any]:
    """`pretrained_cfg`, what stands beside it, and `model_args`, the later over the earlier."""
    beside = {key: config[key] for key in ("num_classes", "global_pool") if config.get(key) is not None}
    return {**(config.get("pretrained_cfg") or {}), **beside, **(config.get("model_args") or {})}


def depth(shapes: Shapes) -> int:
    """How many blocks there are tensors for."""
    numbers = [int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def shape_of(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    """Shape of a tensor that sizes are read from. Raises CheckpointError if it is not there or of another rank."""
    shape = shapes.get(name)
    if shape is None or len(shape) != dimensions:
        raise CheckpointError(f"{name}: {'missing' if shape is None else list(shape)}; the sizes cannot be read")
    return shape


def heads(config: Config, width: int) -> int:
    """Attention heads: from `model_args`, else from the name, else from the width.

    Not from a width that `model_args` chose: timm keeps the number of heads that the architecture has. Raises
    CheckpointError where none of them says it, or what is said does not divide the width.
    """
    name, given = str(config["architecture"]), settings(config).get("num_heads")
    own = any(size in name and width == its for size, its in _WIDTHS.items())
    usual = HEADS.get(width) if own or not (config.get("model_args") or {}).get("embed_dim") else None
    count = given or next((count for start, count in OTHER_HEADS.items() if name.startswith(start)), usual)
    if not isinstance(count, int) or count < 1 or width % count:
        raise CheckpointError(
            f"config.json: the number of heads of {name} at width {width} is unknown; say it in model_args: "
            '{"num_heads": …} (where embed_dim alone was given, timm kept the number that the architecture has)'
        )
    return count


def activation(config: Config) -> Activation:
    """The MLP's activation: from `model_args`, else by the architecture's name.

    Raises CheckpointError for one that is not implemented.
    """
    given = settings(config).get("act_layer")
    if given is not None:
        if given not in ACTIVATION_NAMES:
            raise CheckpointError(f"config.json: act_layer {given!r} is not supported")
        return ACTIVATION_NAMES[given]
    name = str(config["architecture"])
    return next((kind for pattern, kind in OTHER_ACTIVATIONS if re.search(pattern, name)), "gelu")


def trained_with_quick_gelu(config: Config) -> bool:
    """Whether the published tower that these weights are, or come from, was trained with QuickGELU: by the notes that
    go with it, else by its tag."""
    published = config.get("pretrained_cfg") or {}
    if notes := published.get("notes"):
        return "quickgelu" in str(notes).lower()
    return bool(QUICK_GELU.search(f"{config['architecture']}.{published.get('tag', '')}"))


def image_size(config: Config) -> tuple[int, int]:
    """Height and width that the positions were trained for. Raises CheckpointError for what is no size."""
    given = settings(config)
    return _sides(given.get("img_size") or (given.get("input_size") or [3, 224, 224])[1:])


def input_size(config: Config) -> tuple[int, int]:
    """Height and width of the pixels that timm's transform makes. Raises CheckpointError for what is no size.

    `input_size`, but where the network takes one size only and was made for another, that one (`_parse_model_cfg` in
    timm/models/_hub.py).
    """
    given, made_with = config["pretrained_cfg"], config.get("model_args") or {}
    flexible = made_with.get("dynamic_img_size") or made_with.get("use_naflex")
    fixed = given.get("fixed_input_size") and not flexible and made_with.get("strict_img_size") is not False
    size = made_with.get("img_size") if fixed else None
    return _sides(given["input_size"][1:] if size is None else size)


def _sides(size: Any) -> tuple[int, int]:
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise CheckpointError(f"config.json: input_size {size!r} is no [channels, height, width]")
    return sides[0], sides[1]
