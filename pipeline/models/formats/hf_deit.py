"""DeiT in Hugging Face layout: a distillation token beside CLS, one head or two."""

from pipeline.models.architecture import Architecture, HeadInput
from pipeline.models.formats.format import Config, Format, Shapes, Spelling
from pipeline.models.formats.hugging_face import (
    DEFAULTS,
    by_model_type,
    classes,
    common,
    has,
    pooling,
    prefixed,
    spelling,
)


def architecture(config: Config, shapes: Shapes) -> Architecture:
    """With a teacher's head too, the logits are the mean of both heads."""
    config = {**DEFAULTS, **config}
    both = has(shapes, "distillation_classifier.weight")
    labels = classes(config, shapes, "cls_classifier" if both else "classifier")
    head_input: HeadInput = "cls_and_distillation" if both else "cls"
    return Architecture(
        network="vit",
        **common(config),
        qkv_bias="all" if config["qkv_bias"] else "none",
        distillation_token=True,
        **pooling(config, shapes, "deit."),
        head_input=head_input if labels else "none",
        num_labels=labels,
    )


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """Two heads are called `cls_classifier` and `distillation_classifier`."""
    head = "cls_classifier" if a.head_input == "cls_and_distillation" else "classifier"
    return prefixed(spelling(shapes), "deit.", shapes) | {"head": head, "distillation_head": "distillation_classifier"}


FORMAT = Format(
    family="deit",
    layout="Hugging Face",
    examples="facebook/deit-base-distilled-patch16-224, facebook/deit-small-distilled-patch16-224",
    test="tests/models/test_models_parity.py",
    recognise=by_model_type("deit"),
    architecture=architecture,
    spell=spell,
    ignored=(r"(deit\.)?embeddings\.mask_token", r"decoder\.0\.(weight|bias)"),
)
