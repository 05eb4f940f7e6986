"""The text towers of CLIP and SigLIP in Hugging Face layout, beside their image tower."""

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.models.formats.format import (
    Config,
    Shapes,
    Spelling,
    activation,
    count,
    epsilon,
    positive,
    width_and_heads,
)
from pipeline.models.formats.hugging_face import saved_as
from pipeline.models.text_architecture import TextArchitecture, TextFormat
from schemas.errors import CheckpointError

COMMON = {"num_hidden_layers": 12, "max_position_embeddings": 77}
CLIP_DEFAULTS = {
    **COMMON,
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
SIGLIP_DEFAULTS = {
    **COMMON,
    "max_position_embeddings": 64,
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
# What old configs of CLIP say, whatever the tokenizer ends a text with.
LEGACY_END = 2

SPELLING: Spelling = {
    "tokens": "text_model.embeddings.token_embedding.weight",
    "positions": "text_model.embeddings.position_embedding.weight",
    "norm": "text_model.final_layer_norm",
    "blocks.{i}.norm1": "text_model.encoder.layers.{i}.layer_norm1",
    "blocks.{i}.qkv": (
        "text_model.encoder.layers.{i}.self_attn.q_proj",
        "text_model.encoder.layers.{i}.self_attn.k_proj",
        "text_model.encoder.layers.{i}.self_attn.v_proj",
    ),
    "blocks.{i}.out": "text_model.encoder.layers.{i}.self_attn.out_proj",
    "blocks.{i}.norm2": "text_model.encoder.layers.{i}.layer_norm2",
    "blocks.{i}.fc1": "text_model.encoder.layers.{i}.mlp.fc1",
    "blocks.{i}.fc2": "text_model.encoder.layers.{i}.mlp.fc2",
}


def _fields(config: Config, defaults: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tower's config, and the fields of `TextArchitecture` that both families spell alike."""
    text = {**defaults, **(config.get("text_config") or {})}
    width, heads = width_and_heads(text)
    length = positive(text, "max_position_embeddings")
    return text, {
        "width": width,
        "heads": heads,
        "depth": positive(text, "num_hidden_layers"),
        "mlp_width": positive(text, "intermediate_size"),
        "vocabulary": positive(text, "vocab_size"),
        "length": length,
        "position_rows": length,
        "epsilon": epsilon(text),
        "activation": activation(text),
    }


def _projection(shapes: Shapes, name: str) -> int:
    if name not in shapes:
        raise CheckpointError(f"{name}: missing, so the width that texts and images share is unknown")
    return shapes[name][0]


def clip(config: Config, shapes: Shapes) -> TextArchitecture:
    """Each token sees those before it; the embedding is read at the first end-of-text token."""
    text, fields = _fields(config, CLIP_DEFAULTS)
    end = count(text, "eos_token_id")
    return TextArchitecture(
        **fields,
        read="end",
        causal=True,
        end_token=None if end == LEGACY_END else end,
        projection_width=_projection(shapes, "text_projection.weight"),
        projection_bias=False,
    )


def siglip(config: Config, shapes: Shapes) -> TextArchitecture:
    """Padding is seen like any token, and the embedding is read at the last one."""
    _, fields = _fields(config, SIGLIP_DEFAULTS)
    width = _projection(shapes, "text_model.head.weight")
    return TextArchitecture(**fields, read="last", projection_width=width, sigmoid=True)


def _spell(projection: str) -> Callable[[TextArchitecture, Shapes], Spelling]:
    return lambda a, shapes: {**SPELLING, "projection": projection}


def _recognise(model_type: str) -> Callable[[Config, Shapes], str]:
    """A whole model: one saved with an image tower alone has no text tower."""

    def recognise(config: Config, shapes: Shapes) -> str:
        if config.get("model_type") != model_type or not any(name.startswith("text_model.") for name in shapes):
            return ""
        return f"config.json says model_type {model_type!r} ({saved_as(config) or 'no class'}) and text_model is there"

    return recognise


CLIP = TextFormat(
    family="clip text",
    layout="Hugging Face",
    examples="openai/clip-vit-base-patch32, openai/clip-vit-large-patch14",
    test="tests/models/test_models_text.py",
    recognise=_recognise("clip"),
    architecture=clip,
    spell=_spell("text_projection"),
    prefix=("text_model.", "text_projection."),
    scale="logit_scale",
    bias="logit_bias",
    ignored=(r".*position_ids",),
)
SIGLIP = TextFormat(
    family="siglip text",
    layout="Hugging Face",
    examples="google/siglip-base-patch16-224, google/siglip-so400m-patch14-384",
    test="tests/models/test_models_text.py",
    recognise=_recognise("siglip"),
    architecture=siglip,
    spell=_spell("text_model.head"),
    prefix=("text_model.",),
    scale="logit_scale",
    bias="logit_bias",
    ignored=(r".*position_ids",),
)
