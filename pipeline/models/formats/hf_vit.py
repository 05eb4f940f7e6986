"""ViT in Hugging Face layout: ViTModel with and without pooler, ViTForImageClassification."""

from pipeline.models.architecture import Architecture
from pipeline.models.formats.format import Config, Format, Shapes, Spelling
from pipeline.models.formats.hugging_face import DEFAULTS, by_model_type, classes, common, pooling, prefixed, spelling


def architecture(config: Config, shapes: Shapes) -> Architecture:
    """The classifier reads CLS."""
    config = {**DEFAULTS, **config}
    labels = classes(config, shapes)
    return Architecture(
        network="vit",
        **common(config),
        qkv_bias="all" if config["qkv_bias"] else "none",
        **pooling(config, shapes, "vit."),
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
