"""ViT in Hugging Face layout: ViTModel with and without pooler, ViTForImageClassification."""

from pipeline.models.architecture import Architecture
from pipeline.models.formats.format import Config, Format, Shapes, Spelling
from pipeline.models.formats.hugging_face import DEFAULTS, by_model_type, classes, common, has, prefixed, spelling
from schemas.errors import CheckpointError


def architecture(config: Config, shapes: Shapes) -> Architecture:
    """The classifier reads CLS; `pooled` is the trained pooler if there is one, else the mean of the patch tokens."""
    config = {**DEFAULTS, **config}
    pooler = has(shapes, "pooler.dense.weight", "vit.pooler.dense.weight")
    if pooler and config.get("pooler_act", "tanh") != "tanh":
        raise CheckpointError(f"config.json: pooler_act {config['pooler_act']!r} is not supported; only tanh is")
    labels = classes(config, shapes)
    return Architecture(
        network="vit",
        **common(config),
        qkv_bias="all" if config["qkv_bias"] else "none",
        pooled="pooler" if pooler else "mean_patch_tokens",
        projection_width=int(config.get("pooler_output_size") or 0) if pooler else 0,
        head_input="cls" if labels else "none",
        num_labels=labels,
    )


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """Everything but the classifier carries the prefix `vit.` when saved from a model with a head."""
    return prefixed(spelling(shapes), "vit.", shapes) | {"head": "classifier"}


FORMAT = Format(
    family="vit",
    layout="Hugging Face",
    examples="google/vit-base-patch16-224, google/vit-large-patch16-224-in21k",
    test="tests/models/test_models_parity.py",
    recognise=by_model_type("vit"),
    architecture=architecture,
    spell=spell,
    ignored=(r"(vit\.)?embeddings\.mask_token", r"decoder\.0\.(weight|bias)"),
)
