"""timm's BEiT and BEiT v2: queries and values have biases of their own, keys have none; one table for each block."""

from pipeline.models.architecture import Architecture
from pipeline.models.formats import timm, timm_vit
from pipeline.models.formats.format import Config, Format, Shapes, Spelling
from schemas.errors import CheckpointError

SPELLING: Spelling = {
    **timm_vit.SPELLING,
    "blocks.{i}.qkv.weight": "blocks.{i}.attn.qkv.weight",
    "blocks.{i}.qkv.bias": ("blocks.{i}.attn.q_bias", None, "blocks.{i}.attn.v_bias"),
    "blocks.{i}.scale1": "blocks.{i}.gamma_1",
    "blocks.{i}.scale2": "blocks.{i}.gamma_2",
    "blocks.{i}.relative_table": "blocks.{i}.attn.relative_position_bias_table",
    "relative_table": "rel_pos_bias.relative_position_bias_table",
}


def architecture(config: Config, shapes: Shapes) -> Architecture:
    """With mean pooling the norm stands behind the pooling (`fc_norm`) and the last hidden state has none.

    Raises CheckpointError for a pre-training head, which timm's networks lack, and where `beit_final_norm` is asked
    for: timm keeps no norm that it does not apply.
    """
    if config.get("beit_final_norm"):
        raise CheckpointError(
            "--beit-final-norm is for pre-training checkpoints in Hugging Face layout; a BEiT of timm has no trained "
            "final norm that is left out; drop the option"
        )
    if "lm_head.weight" in shapes:
        raise CheckpointError(
            "a BEiT pre-training checkpoint as it was first published (lm_head is there); take its conversion to "
            "Hugging Face's layout, such as microsoft/beit-base-patch16-224-pt22k"
        )
    width, _, *patch = timm.shape_of(shapes, "patch_embed.proj.weight", 4)
    shared = "rel_pos_bias.relative_position_bias_table" in shapes
    each = "blocks.0.attn.relative_position_bias_table" in shapes
    pooled, head_input = timm_vit.read_out(config, shapes, projects=False)
    return Architecture(
        network="beit",
        width=width,
        depth=timm.depth(shapes),
        heads=timm.heads(config, width),
        mlp_width=shapes.get("blocks.0.mlp.fc2.weight", (0, 0))[1],
        patch_size=(patch[0], patch[1]),
        trained_size=timm.image_size(config),
        epsilon=1e-6,
        activation=timm.activation(config),
        qkv_bias="query_value" if "blocks.0.attn.q_bias" in shapes else "none",
        positions="all" if "pos_embed" in shapes else "none",
        position_resize="bicubic_antialias",
        table_resize="geometric",
        relative_positions="shared" if shared else "each" if each else "none",
        layer_scale="blocks.0.gamma_1" in shapes,
        final_norm="fc_norm.weight" not in shapes,
        pooled=pooled,
        pool_norm="trained" if "fc_norm.weight" in shapes else "none",
        head_input=head_input,
        num_labels=shapes.get("head.weight", (0,))[0],
    )


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """One spelling for all."""
    return SPELLING


FORMAT = Format(
    family="beit",
    layout="timm",
    examples="timm/beit_base_patch16_224.in22k_ft_in22k_in1k, timm/beitv2_large_patch16_224.in1k_ft_in22k_in1k",
    test="tests/models/test_models_timm.py",
    recognise=timm.by_architecture(r"beit(v2)?_", "patch_embed.proj.weight"),
    architecture=architecture,
    spell=spell,
    ignored=(r".*relative_position_index", r"mask_token", r".*k_bias"),
)
