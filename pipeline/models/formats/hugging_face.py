"""What the Hugging Face layouts of ViT-like models have in common: names of tensors and of config keys."""

from collections.abc import Mapping
from typing import Any

from pipeline.models.formats.format import (
    Config,
    Shapes,
    Spelling,
    activation,
    epsilon,
    pair,
    positive,
    width_and_heads,
)
from schemas.errors import CheckpointError

# What the config classes of ViT, DeiT and BEiT hold where config.json is silent.
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}

SPELLING: Spelling = {
    "patch": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "distillation_token": "embeddings.distillation_token",
    "positions": "embeddings.position_embeddings",
    "blocks.{i}.norm1": "encoder.layer.{i}.layernorm_before",
    "blocks.{i}.qkv": (
        "encoder.layer.{i}.attention.attention.query",
        "encoder.layer.{i}.attention.attention.key",
        "encoder.layer.{i}.attention.attention.value",
    ),
    "blocks.{i}.out": "encoder.layer.{i}.attention.output.dense",
    "blocks.{i}.norm2": "encoder.layer.{i}.layernorm_after",
    "blocks.{i}.fc1": "encoder.layer.{i}.intermediate.dense",
    "blocks.{i}.fc2": "encoder.layer.{i}.output.dense",
    "norm": "layernorm",
    "pooler": "pooler.dense",
}

# What transformers 5 calls these modules in memory, and so in a state dict; `save_pretrained` goes back to the names
# above unless told `save_original_format=False`.
ATTENTION_IN_MEMORY = tuple(f"attention.{name}_proj" for name in "qkv")
IN_MEMORY: Spelling = {
    **SPELLING,
    "blocks.{i}.norm1": "layers.{i}.layernorm_before",
    "blocks.{i}.qkv": tuple(f"layers.{{i}}.{name}" for name in ATTENTION_IN_MEMORY),
    "blocks.{i}.out": "layers.{i}.attention.o_proj",
    "blocks.{i}.norm2": "layers.{i}.layernorm_after",
    "blocks.{i}.fc1": "layers.{i}.mlp.fc1",
    "blocks.{i}.fc2": "layers.{i}.mlp.fc2",
}


def from_memory(shapes: Shapes) -> bool:
    """Whether tensors go by the names of transformers 5 in memory."""
    return any(f".{ATTENTION_IN_MEMORY[0]}." in name for name in shapes)


def spelling(shapes: Shapes) -> Spelling:
    """The one of the two by which these tensors go."""
    return IN_MEMORY if from_memory(shapes) else SPELLING


def prefixed(spelling: Spelling, prefix: str, shapes: Shapes) -> dict[str, str | tuple[str | None, ...]]:
    """`spelling` with `prefix` before each name, if the checkpoint was saved from a model that has one."""
    if not any(name.startswith(prefix) for name in shapes):
        return dict(spelling)
    return {
        ours: prefix + theirs
        if isinstance(theirs, str)
        else tuple(name if name is None else prefix + name for name in theirs)
        for ours, theirs in spelling.items()
    }


def common(config: Config) -> dict[str, Any]:
    """Fields of `Architecture` that all of these configs spell alike. Raises CheckpointError for a wrong value."""
    if config["num_channels"] != 3:
        raise CheckpointError(f"config.json: num_channels is {config['num_channels']}; only RGB models are supported")
    width, heads = width_and_heads(config)
    return {
        "width": width,
        "heads": heads,
        "depth": positive(config, "num_hidden_layers"),
        "mlp_width": positive(config, "intermediate_size"),
        "patch_size": pair(config, "patch_size"),
        "trained_size": pair(config, "image_size"),
        "epsilon": epsilon(config),
        "activation": activation(config),
    }


def pooling(config: Config, shapes: Shapes, prefix: str) -> dict[str, Any]:
    """Fields of `Architecture` for `pooled`: the trained pooler if there is one, else the mean of the patch tokens.

    Raises CheckpointError for a pooler with another activation than tanh.
    """
    if not has(shapes, "pooler.dense.weight", f"{prefix}pooler.dense.weight"):
        return {"pooled": "mean_patch_tokens"}
    if config.get("pooler_act", "tanh") != "tanh":
        raise CheckpointError(f"config.json: pooler_act {config['pooler_act']!r} is not supported; only tanh is")
    return {"pooled": "pooler", "projection_width": int(config.get("pooler_output_size") or 0)}


def has(shapes: Shapes, *names: str) -> bool:
    """Whether one of the tensors is there."""
    return any(name in shapes for name in names)


def saved_as(config: Config) -> str:
    """The class that a checkpoint was saved from, or "" where config.json does not say."""
    names = config.get("architectures") or [""]
    return str(names[0])


def classes(config: Config, shapes: Shapes, head: str = "classifier") -> int:
    """Number of classes, 0 without a classifier: from the head's shape, else from what config.json announces."""
    shape = shapes.get(f"{head}.weight")
    if shape is not None:
        return int(shape[0])
    if "ForImageClassification" not in saved_as(config):
        return 0
    names, number = config.get("id2label"), config.get("num_labels")
    return len(names) if names is not None else 2 if number is None else int(number)


def by_model_type(*model_types: str) -> Any:
    """A `recognise` for configs that name their family."""

    def recognise(config: Config, shapes: Shapes) -> str:
        model_type = config.get("model_type")
        return f"config.json says model_type {model_type!r}" if model_type in model_types else ""

    return recognise
