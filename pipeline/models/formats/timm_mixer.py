"""timm's MLP-Mixer (S, B and L): no positions, no CLS token, pooled by mean; it runs at the size it was trained at."""

from pipeline.models.architecture import Architecture
from pipeline.models.formats import timm
from pipeline.models.formats.format import Config, Format, Shapes, Spelling

SPELLING: Spelling = {
    "patch": "stem.proj",
    "blocks.{i}.norm1": "blocks.{i}.norm1",
    "blocks.{i}.token_fc1": "blocks.{i}.mlp_tokens.fc1",
    "blocks.{i}.token_fc2": "blocks.{i}.mlp_tokens.fc2",
    "blocks.{i}.norm2": "blocks.{i}.norm2",
    "blocks.{i}.fc1": "blocks.{i}.mlp_channels.fc1",
    "blocks.{i}.fc2": "blocks.{i}.mlp_channels.fc2",
    "norm": "norm",
    "head": "head",
}


def architecture(config: Config, shapes: Shapes) -> Architecture:
    """From the tensors alone; how many patches there are says how large the images were."""
    width, _, *patch = timm.shape_of(shapes, "stem.proj.weight", 4)
    token_mlp_width, tokens = timm.shape_of(shapes, "blocks.0.mlp_tokens.fc1.weight", 2)
    mlp_width, _ = timm.shape_of(shapes, "blocks.0.mlp_channels.fc1.weight", 2)
    side = round(tokens**0.5)
    return Architecture(
        network="mixer",
        width=width,
        depth=timm.depth(shapes),
        heads=0,
        mlp_width=mlp_width,
        token_mlp_width=token_mlp_width,
        patch_size=(patch[0], patch[1]),
        trained_size=(side * patch[0], side * patch[1]),
        epsilon=1e-6,
        class_token=False,
        positions="none",
        pooled="mean_patch_tokens",
        head_input="pooled" if "head.weight" in shapes else "none",
        num_labels=shapes.get("head.weight", (0,))[0],
    )


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """One spelling for all."""
    return SPELLING


FORMAT = Format(
    family="mixer",
    layout="timm",
    examples="timm/mixer_b16_224.goog_in21k_ft_in1k, timm/mixer_l16_224.goog_in21k",
    test="tests/models/test_models_timm.py",
    recognise=timm.by_architecture(r"mixer_", "stem.proj.weight"),
    architecture=architecture,
    spell=spell,
)
