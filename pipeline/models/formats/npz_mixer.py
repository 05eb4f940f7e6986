"""google-research's `.npz` of MLP-Mixer: B/16, B/32, L/16. Pooled by mean; there is no CLS token.

The number of patches is part of the weights, so a Mixer runs at the resolution it was trained at. GELU is exact, as
timm runs these weights.
"""

import re

from pipeline.models.architecture import Architecture
from pipeline.models.formats import npz_vit
from pipeline.models.formats.format import Config, Format, Shapes, Spelling
from schemas.errors import CheckpointError

BLOCK = "MixerBlock_{i}/"


def architecture(config: Config, shapes: Shapes) -> Architecture:
    """From the arrays alone; checked against the file's name where that says something."""
    width, _, *patch = shapes["stem/kernel"]
    depth = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"MixerBlock_(\d+)/", name)))
    token_mlp_width, tokens = _shape(shapes, "MixerBlock_0/token_mixing/Dense_0/kernel")
    mlp_width, _ = _shape(shapes, "MixerBlock_0/channel_mixing/Dense_0/kernel")
    side = round(tokens**0.5)
    size = (side * patch[0], side * patch[1])
    npz_vit.check_name(config["file_name"], (width, depth, patch[0]), size)
    return Architecture(
        network="mixer",
        width=width,
        depth=depth,
        heads=0,
        mlp_width=mlp_width,
        token_mlp_width=token_mlp_width,
        patch_size=(patch[0], patch[1]),
        trained_size=size,
        epsilon=1e-6,
        class_token=False,
        positions="none",
        pooled="mean_patch_tokens",
        head_input="pooled" if "head/kernel" in shapes else "none",
        num_labels=shapes.get("head/kernel", (0,))[0],
    )


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if len(shapes.get(name, ())) != 2:
        raise CheckpointError(f"{name}: missing, or no matrix; the sizes of this MLP-Mixer cannot be read")
    return shapes[name]


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """One spelling for all."""
    modules: dict[str, str | tuple[str, ...]] = {
        "patch": "stem",
        "blocks.{i}.token_fc1": f"{BLOCK}token_mixing/Dense_0",
        "blocks.{i}.token_fc2": f"{BLOCK}token_mixing/Dense_1",
        "blocks.{i}.fc1": f"{BLOCK}channel_mixing/Dense_0",
        "blocks.{i}.fc2": f"{BLOCK}channel_mixing/Dense_1",
        "head": "head",
    }
    norms = {
        "blocks.{i}.norm1": f"{BLOCK}LayerNorm_0",
        "blocks.{i}.norm2": f"{BLOCK}LayerNorm_1",
        "norm": "pre_head_layer_norm",
    }
    return npz_vit.in_flax(modules, norms)


def recognise(config: Config, shapes: Shapes) -> str:
    """An `.npz` with a Mixer's stem and blocks."""
    if "raw_shapes" not in config or "stem/kernel" not in shapes:
        return ""
    has_blocks = any(name.startswith("MixerBlock_") for name in shapes)
    return "it is an .npz with stem/kernel and MixerBlock" if has_blocks else ""


FORMAT = Format(
    family="mixer",
    layout="google-research .npz",
    examples="gs://mixer_models/imagenet1k/Mixer-B_16.npz, gs://mixer_models/imagenet21k/Mixer-L_16.npz",
    test="tests/models/test_models_mixer.py",
    recognise=recognise,
    architecture=architecture,
    spell=spell,
    ignored=npz_vit.FORMAT.ignored,
)
