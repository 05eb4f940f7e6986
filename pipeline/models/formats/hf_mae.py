"""MAE in Hugging Face layout: the encoder, with nothing masked. The decoder of pre-training is left out."""

from pipeline.models.architecture import Architecture
from pipeline.models.formats.format import Config, Format, Shapes, Spelling
from pipeline.models.formats.hugging_face import DEFAULTS, by_model_type, common, prefixed, spelling


def architecture(config: Config, shapes: Shapes) -> Architecture:
    """A plain ViT without pooler or head. transformers masks 3/4 of the patches at random; we never do."""
    config = {**DEFAULTS, **config}
    return Architecture(network="vit", **common(config), qkv_bias="all" if config["qkv_bias"] else "none")


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """Saved for pre-training, the encoder carries the prefix `vit.`."""
    return prefixed(spelling(shapes), "vit.", shapes)


FORMAT = Format(
    family="vit_mae",
    layout="Hugging Face",
    examples="facebook/vit-mae-base, facebook/vit-mae-huge",
    test="tests/models/test_models_parity.py",
    recognise=by_model_type("vit_mae"),
    architecture=architecture,
    spell=spell,
    ignored=(r"decoder\..*",),
)
