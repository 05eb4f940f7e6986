"""DINOv2 in Hugging Face layout, with and without registers, SwiGLU giant too."""

from pipeline.models.architecture import Architecture
from pipeline.models.formats.format import Config, Format, Shapes, Spelling, count, positive, ratio
from pipeline.models.formats.hugging_face import (
    ATTENTION_IN_MEMORY,
    DEFAULTS,
    SPELLING,
    by_model_type,
    classes,
    common,
    from_memory,
    prefixed,
)

DEFAULTS_DINOV2 = {
    **DEFAULTS,
    "layer_norm_eps": 1e-6,
    "patch_size": 14,
    "mlp_ratio": 4,
    "use_swiglu_ffn": False,
    "num_register_tokens": 4,
}

BODY: Spelling = {
    **SPELLING,
    "registers": "embeddings.register_tokens",
    "blocks.{i}.norm1": "encoder.layer.{i}.norm1",
    "blocks.{i}.scale1": "encoder.layer.{i}.layer_scale1.lambda1",
    "blocks.{i}.norm2": "encoder.layer.{i}.norm2",
    "blocks.{i}.fc1": "encoder.layer.{i}.mlp.fc1",
    "blocks.{i}.fc2": "encoder.layer.{i}.mlp.fc2",
    "blocks.{i}.scale2": "encoder.layer.{i}.layer_scale2.lambda1",
}
SWIGLU: Spelling = {
    "blocks.{i}.fc1": "encoder.layer.{i}.mlp.weights_in",
    "blocks.{i}.fc2": "encoder.layer.{i}.mlp.weights_out",
}
BODY_IN_MEMORY: Spelling = {
    **BODY,
    "blocks.{i}.qkv": tuple(f"encoder.layer.{{i}}.{name}" for name in ATTENTION_IN_MEMORY),
    "blocks.{i}.out": "encoder.layer.{i}.attention.o_proj",
}
SWIGLU_IN_MEMORY: Spelling = {
    "blocks.{i}.fc1": ("encoder.layer.{i}.mlp.gate_proj", "encoder.layer.{i}.mlp.up_proj"),
    "blocks.{i}.fc2": "encoder.layer.{i}.mlp.down_proj",
}


def architecture(config: Config, shapes: Shapes) -> Architecture:
    """The classifier reads CLS beside the mean of the patch tokens. With registers, positions are antialiased."""
    config = {**DEFAULTS_DINOV2, **config}
    hidden = int(positive(config, "hidden_size") * ratio(config, "mlp_ratio"))
    swiglu = bool(config["use_swiglu_ffn"])
    registers = count(config, "num_register_tokens") if config["model_type"] == "dinov2_with_registers" else 0
    fields = common({**config, "intermediate_size": (int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden})
    labels = classes(config, shapes)
    return Architecture(
        network="vit",
        **{**fields, "activation": "silu" if swiglu else fields["activation"]},
        swiglu=swiglu,
        qkv_bias="all" if config["qkv_bias"] else "none",
        registers=registers,
        position_resize="bicubic_antialias" if registers else "bicubic",
        layer_scale=True,
        head_input="cls_and_mean" if labels else "none",
        num_labels=labels,
    )


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """The prefix is the name of the family."""
    body, swiglu = (BODY_IN_MEMORY, SWIGLU_IN_MEMORY) if from_memory(shapes) else (BODY, SWIGLU)
    body = {**body, **swiglu} if a.swiglu else body
    prefix = "dinov2_with_registers." if a.registers else "dinov2."
    return prefixed(body, prefix, shapes) | {"head": "classifier"}


FORMAT = Format(
    family="dinov2",
    layout="Hugging Face",
    examples="facebook/dinov2-base, facebook/dinov2-with-registers-giant",
    test="tests/models/test_models_parity.py",
    recognise=by_model_type("dinov2", "dinov2_with_registers"),
    architecture=architecture,
    spell=spell,
    ignored=(r"(dinov2(_with_registers)?\.)?embeddings\.mask_token",),
)
