"""The image towers of CLIP and SigLIP in Hugging Face layout, alone or beside their text tower, which is left out."""

from collections.abc import Mapping
from typing import Any

from pipeline.models.architecture import Architecture
from pipeline.models.formats.format import Config, Format, Shapes, Spelling
from pipeline.models.formats.hugging_face import DEFAULTS, by_model_type, common, has, prefixed

CLIP_DEFAULTS = {**DEFAULTS, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP_DEFAULTS = {**DEFAULTS, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True}

BODY: Spelling = {
    "patch": "embeddings.patch_embedding",
    "cls_token": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding.weight",
    "pre_norm": "pre_layrnorm",  # sic
    "blocks.{i}.norm1": "encoder.layers.{i}.layer_norm1",
    "blocks.{i}.qkv": (
        "encoder.layers.{i}.self_attn.q_proj",
        "encoder.layers.{i}.self_attn.k_proj",
        "encoder.layers.{i}.self_attn.v_proj",
    ),
    "blocks.{i}.out": "encoder.layers.{i}.self_attn.out_proj",
    "blocks.{i}.norm2": "encoder.layers.{i}.layer_norm2",
    "blocks.{i}.fc1": "encoder.layers.{i}.mlp.fc1",
    "blocks.{i}.fc2": "encoder.layers.{i}.mlp.fc2",
    "norm": "post_layernorm",
    "pool_norm": "post_layernorm",
    "attention_pool.probe": "head.probe",
    "attention_pool.qkv.weight": "head.attention.in_proj_weight",
    "attention_pool.qkv.bias": "head.attention.in_proj_bias",
    "attention_pool.out": "head.attention.out_proj",
    "attention_pool.norm": "head.layernorm",
    "attention_pool.fc1": "head.mlp.fc1",
    "attention_pool.fc2": "head.mlp.fc2",
}
IGNORED = (r"text_model\..*", r"text_projection\..*", r"logit_(scale|bias)", r".*position_ids")


def vision(config: Config, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the image tower, which a whole model keeps in `vision_config`; null stands for the defaults."""
    return {**defaults, **(config.get("vision_config", config) or {})}


def clip(config: Config, shapes: Shapes) -> Architecture:
    """`pooled` is the embedding shared with text where the projection is there, else the normalised CLS token.

    As in transformers the last hidden state, and so `cls`, is not normalised. A classifier instead reads the mean of
    its patch tokens, not normalised either.
    """
    labels = shapes.get("classifier.weight", (0,))[0]
    projection = shapes.get("visual_projection.weight", (0,))[0]
    return Architecture(
        network="vit",
        **common(vision(config, CLIP_DEFAULTS)),
        patch_bias=False,
        pre_norm=True,
        final_norm=False,
        pooled="mean_patch_tokens" if labels else "projected_cls" if projection else "layernormed_cls",
        pool_norm="none" if labels else "trained",
        projection_width=0 if labels else projection,
        projection_bias=False,
        head_input="pooled" if labels else "none",
        num_labels=labels,
    )


def siglip(config: Config, shapes: Shapes) -> Architecture:
    """No CLS token; `pooled` is the attention pool. A classifier instead reads the mean of the patch tokens."""
    fields = vision(config, SIGLIP_DEFAULTS)
    labels = shapes.get("classifier.weight", (0,))[0]
    # A classifier's checkpoint may hold a pooling head all the same, which nothing reads.
    pool = not labels and (has(shapes, "head.probe", "vision_model.head.probe") or fields["vision_use_head"])
    return Architecture(
        network="vit",
        **common(fields),
        class_token=False,
        positions="patches",
        pooled="attention_pool" if pool else "mean_patch_tokens",
        head_input="pooled" if labels else "none",
        num_labels=labels,
    )


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """The tower carries the prefix `vision_model.`."""
    return prefixed(BODY, "vision_model.", shapes) | {"projection": "visual_projection", "head": "classifier"}


CLIP = Format(
    family="clip",
    layout="Hugging Face",
    examples="openai/clip-vit-base-patch32, openai/clip-vit-large-patch14",
    test="tests/models/test_models_parity.py",
    recognise=by_model_type("clip", "clip_vision_model"),
    architecture=clip,
    spell=spell,
    # A classifier's checkpoint holds the norm of CLS all the same, which nothing reads.
    ignored=(*IGNORED, r"(vision_model\.)?post_layernorm\..*"),
)
SIGLIP = Format(
    family="siglip",
    layout="Hugging Face",
    examples="google/siglip-base-patch16-224, google/siglip-so400m-patch14-384",
    test="tests/models/test_models_parity.py",
    recognise=by_model_type("siglip", "siglip_vision_model"),
    architecture=siglip,
    spell=spell,
    ignored=(*IGNORED, r"(vision_model\.)?head\..*"),
)
