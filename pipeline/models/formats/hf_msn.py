"""MSN (masked siamese networks) in Hugging Face layout: a ViT without a pooler, ViTMSNForImageClassification too."""

from pipeline.models.architecture import Architecture
from pipeline.models.formats import hf_vit
from pipeline.models.formats.format import Config, Format, Shapes, Spelling
from pipeline.models.formats.hugging_face import SPELLING, by_model_type


def architecture(config: Config, shapes: Shapes) -> Architecture:
    """As ViT, but for what the norms add to the variance where config.json is silent."""
    return hf_vit.architecture({"layer_norm_eps": 1e-6, **config}, shapes)


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """As ViT; but of a model with a head transformers 5.23 saves the blocks without the prefix of the rest."""
    names = dict(hf_vit.spell(a, shapes))
    if any(name.startswith("encoder.") for name in shapes):
        names |= {ours: theirs for ours, theirs in SPELLING.items() if ours.startswith("blocks.")}
    return names


FORMAT = Format(
    family="vit_msn",
    layout="Hugging Face",
    examples="facebook/vit-msn-small, facebook/vit-msn-large-7",
    test="tests/models/test_models_parity.py",
    recognise=by_model_type("vit_msn"),
    architecture=architecture,
    spell=spell,
    ignored=hf_vit.FORMAT.ignored,
)
