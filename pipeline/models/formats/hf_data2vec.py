"""data2vec-vision in Hugging Face layout: a BEiT by another name."""

import dataclasses

from pipeline.models.architecture import Architecture
from pipeline.models.formats import hf_beit
from pipeline.models.formats.format import Config, Format, Shapes, Spelling
from pipeline.models.formats.hugging_face import by_model_type, prefixed


def architecture(config: Config, shapes: Shapes) -> Architecture:
    """As BEiT, but transformers makes up no pooler where the checkpoint has none: the plain mean is taken then."""
    a = hf_beit.architecture(config, shapes)
    if a.pool_norm == "made_up":
        return dataclasses.replace(a, pooled="mean_patch_tokens", pool_norm="none")
    return a


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """BEiT's names under the prefix `data2vec_vision.`."""
    return prefixed(hf_beit.BODY, "data2vec_vision.", shapes) | {"head": "classifier"}


FORMAT = Format(
    family="data2vec-vision",
    layout="Hugging Face",
    examples="facebook/data2vec-vision-base, facebook/data2vec-vision-large-ft1k",
    test="tests/models/test_models_parity.py",
    recognise=by_model_type("data2vec-vision"),
    architecture=architecture,
    spell=spell,
    ignored=(r"(data2vec_vision\.)?embeddings\.mask_token", r".*relative_position_index"),
)
