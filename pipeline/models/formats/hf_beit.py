"""BEiT in Hugging Face layout: BeitModel, BeitForImageClassification, BeitForMaskedImageModeling.

A pre-training checkpoint (BeitForMaskedImageModeling) keeps its trained final norm outside the body. `BeitModel` loaded
from it drops that norm: its last hidden state is not normalised, and its pooler output is a LayerNorm without trained
weights over the mean of the patch tokens. That is what we match unless the final norm is asked for.
"""

from pipeline.models.architecture import Architecture, Pooled, PoolNorm
from pipeline.models.formats.format import Config, Format, Shapes, Spelling
from pipeline.models.formats.hugging_face import (
    DEFAULTS,
    IN_MEMORY,
    SPELLING,
    by_model_type,
    classes,
    common,
    from_memory,
    has,
    prefixed,
    saved_as,
)
from schemas.errors import CheckpointError

DEFAULTS_BEIT = {
    **DEFAULTS,
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "layer_scale_init_value": 0.1,
    "use_mean_pooling": True,
    "beit_final_norm": False,
}


BODY: Spelling = {
    **SPELLING,
    "blocks.{i}.scale1": "encoder.layer.{i}.lambda_1",
    "blocks.{i}.scale2": "encoder.layer.{i}.lambda_2",
    "relative_table": "encoder.relative_position_bias.relative_position_bias_table",
    "blocks.{i}.relative_table": (
        "encoder.layer.{i}.attention.attention.relative_position_bias.relative_position_bias_table"
    ),
    "pool_norm": "pooler.layernorm",
}
BODY_IN_MEMORY: Spelling = {
    **BODY,
    **IN_MEMORY,
    "blocks.{i}.scale1": "layers.{i}.lambda_1",
    "blocks.{i}.scale2": "layers.{i}.lambda_2",
    "relative_table": "shared_position_bias.relative_position_bias_table",
    "blocks.{i}.relative_table": "layers.{i}.relative_position_bias.relative_position_bias_table",
}


def is_pretraining(config: Config, shapes: Shapes) -> bool:
    """Whether the checkpoint predicts visual tokens."""
    return saved_as(config) == "BeitForMaskedImageModeling" or has(shapes, "lm_head.weight")


def architecture(config: Config, shapes: Shapes) -> Architecture:
    """`beit_final_norm` (put into the config by the caller) applies the trained norm of a pre-training checkpoint."""
    config = {**DEFAULTS_BEIT, **config}
    mean_pooling = config["use_mean_pooling"]
    if config["beit_final_norm"] and not (mean_pooling and is_pretraining(config, shapes)):
        raise CheckpointError(
            "--beit-final-norm: this BEiT checkpoint has no trained final norm that is left out; drop the option"
        )
    final_norm = not mean_pooling or config["beit_final_norm"]
    labels = classes(config, shapes)
    trained = labels > 0 or has(shapes, "pooler.layernorm.weight", "beit.pooler.layernorm.weight")
    pooled: Pooled = "layernormed_mean_patch_tokens" if mean_pooling else "cls"
    pool_norm: PoolNorm = ("trained" if trained else "made_up") if mean_pooling else "none"
    if final_norm and mean_pooling:
        pooled, pool_norm = "mean_patch_tokens", "none"
    codebook = shapes.get("lm_head.weight", (0,))[0]
    shared, each = config["use_shared_relative_position_bias"], config["use_relative_position_bias"]
    return Architecture(
        network="beit",
        **common(config),
        qkv_bias="query_value",
        positions="all" if config["use_absolute_position_embeddings"] else "none",
        relative_positions="shared" if shared else "each" if each else "none",
        layer_scale=(config["layer_scale_init_value"] or 0) > 0,
        final_norm=final_norm,
        pooled=pooled,
        pool_norm=pool_norm,
        head_input="pooled" if labels else "none",
        num_labels=labels,
        visual_tokens=codebook,
        token_norm=bool(codebook) and not config["beit_final_norm"],
    )


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """The trained norm of a pre-training checkpoint is the top-level `layernorm`, beside the body `beit.`."""
    body = BODY_IN_MEMORY if from_memory(shapes) else BODY
    spelling = prefixed(body, "beit.", shapes) | {"head": "classifier"}
    spelling |= {"token_norm": "layernorm", "token_head": "lm_head"}
    if a.pooled == "mean_patch_tokens":
        spelling["norm"] = "layernorm"
    return spelling


FORMAT = Format(
    family="beit",
    layout="Hugging Face",
    examples="microsoft/beit-large-patch16-224-pt22k, microsoft/beit-base-patch16-224-pt22k-ft22k",
    test="tests/models/test_models_parity.py",
    recognise=by_model_type("beit"),
    architecture=architecture,
    spell=spell,
    ignored=(
        r"(beit\.)?embeddings\.mask_token",
        r".*relative_position_index",
        r"layernorm\.(weight|bias)",
    ),
)
