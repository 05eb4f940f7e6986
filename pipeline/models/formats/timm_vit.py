"""timm's Vision Transformers: ViT, DeiT (distilled too), DeiT-3, DINO, DINOv2, MAE, and the towers of CLIP and SigLIP.

What differs is read from the tensors that are there: CLS token, registers, LayerScale, SwiGLU, a norm before the blocks
(CLIP), a norm behind the pooling (`fc_norm`), an attention pool (SigLIP), a second head (distilled DeiT).
"""

import re

from pipeline.models.architecture import Architecture, HeadInput, Pooled, Positions, Stem
from pipeline.models.formats import timm
from pipeline.models.formats.format import Config, Format, Shapes, Spelling
from schemas.errors import CheckpointError

SPELLING: Spelling = {
    "patch": "patch_embed.proj",
    "cls_token": "cls_token",
    "distillation_token": "dist_token",
    "registers": "reg_token",
    "positions": "pos_embed",
    "pre_norm": "norm_pre",
    "blocks.{i}.norm1": "blocks.{i}.norm1",
    "blocks.{i}.qkv": "blocks.{i}.attn.qkv",
    "blocks.{i}.out": "blocks.{i}.attn.proj",
    "blocks.{i}.scale1": "blocks.{i}.ls1.gamma",
    "blocks.{i}.norm2": "blocks.{i}.norm2",
    "blocks.{i}.fc1": "blocks.{i}.mlp.fc1",
    "blocks.{i}.fc2": "blocks.{i}.mlp.fc2",
    "blocks.{i}.scale2": "blocks.{i}.ls2.gamma",
    "norm": "norm",
    "pool_norm": "fc_norm",
    "attention_pool.probe": "attn_pool.latent",
    "attention_pool.qkv": ("attn_pool.q", "attn_pool.kv"),
    "attention_pool.out": "attn_pool.proj",
    "attention_pool.norm": "attn_pool.norm",
    "attention_pool.fc1": "attn_pool.mlp.fc1",
    "attention_pool.fc2": "attn_pool.mlp.fc2",
    "head": "head",
    "distillation_head": "head_dist",
    "projection": "head",
}


_OTHER_NETWORKS = re.compile(r"_rope|_dinov3|_lingbot|_sapiens2|_pe_(core|lang|spatial)_|_rpn_")
# Width of a published CLIP tower → of the space that it shares with text.
CLIP_WIDTHS = {256: 512, 512: 512, 640: 512, 768: 512, 896: 640, 1024: 768, 1280: 1024, 1408: 1024, 1664: 1280}


def architecture(config: Config, shapes: Shapes, stem: Stem | None = None) -> Architecture:
    """`pooled` is what timm hands to the head, but the mean of the patch tokens where that is just the CLS token."""
    refuse_other_networks(str(config["architecture"]))
    width, _, *kernel = timm.shape_of(shapes, "patch_embed.proj.weight", 4)
    patch = [side * (stem.stride if stem else 1) for side in kernel]
    hidden, mlp_width = shapes.get("blocks.0.mlp.fc1.weight", (0,))[0], shapes.get("blocks.0.mlp.fc2.weight", (0, 0))[1]
    size, pre_norm = timm.image_size(config), "norm_pre.weight" in shapes
    classes = shapes.get("head.weight", (0,))[0]
    projects = bool(classes) and is_clip_embedding(config, width)
    pooled, head_input = read_out(config, shapes, projects)
    registers = shapes.get("reg_token", (1, 0, width))[1]
    return Architecture(
        network="vit",
        width=width,
        depth=timm.depth(shapes),
        heads=timm.heads(config, width),
        mlp_width=mlp_width,
        patch_size=(patch[0], patch[1]),
        trained_size=size,
        epsilon=1e-5 if "_clip_" in str(config["architecture"]) else 1e-6,
        activation="silu" if hidden == 2 * mlp_width else timm.activation(config),
        swiglu=hidden == 2 * mlp_width,
        patch_bias="patch_embed.proj.bias" in shapes,
        qkv_bias="all" if "blocks.0.attn.qkv.bias" in shapes else "none",
        class_token="cls_token" in shapes,
        distillation_token="dist_token" in shapes,
        registers=registers,
        positions=positions(shapes, (size[0] // patch[0]) * (size[1] // patch[1])),
        position_resize="bicubic_antialias",
        pre_norm=pre_norm,
        layer_scale="blocks.0.ls1.gamma" in shapes or "blocks.0.gamma_1" in shapes,
        final_norm="norm.weight" in shapes,
        pooled=pooled,
        pool_norm="trained" if "fc_norm.weight" in shapes else "none",
        projection_width=classes if projects else 0,
        projection_bias="head.bias" in shapes,
        head_input=head_input,
        num_labels=0 if projects else classes,
        stem=stem,
    )


def refuse_other_networks(name: str) -> None:
    """Raise CheckpointError for an architecture of timm that computes otherwise than its tensors show.

    Rotary positions are in no tensor (timm/models/eva.py), nor is it that a norm stands behind attention and MLP
    (`ResPostBlock` in timm/models/vision_transformer.py).
    """
    if found := _OTHER_NETWORKS.search(name):
        raise CheckpointError(
            f"config.json: {name} is no plain ViT ({found[0].strip('_')}: rotary positions, or norms behind attention "
            "and MLP), which its tensors do not show; it is not supported"
        )


def read_out(config: Config, shapes: Shapes, projects: bool) -> tuple[Pooled, HeadInput]:
    """What `pooled` is, and what the classifier reads."""
    by_mean = "fc_norm.weight" in shapes or "cls_token" not in shapes
    default = "map" if "attn_pool.latent" in shapes else "avg" if by_mean else "token"
    how = str(timm.settings(config).get("global_pool") or default)
    if projects:
        return "projected_cls", "none"
    head: bool = "head.weight" in shapes
    if "head_dist.weight" in shapes:
        return "mean_patch_tokens", "cls_and_distillation"
    with_prefix = timm.settings(config).get("pool_include_prefix") and {"cls_token", "reg_token"} & shapes.keys()
    if how in ("avg", "map") and with_prefix:
        raise CheckpointError(
            "config.json: model_args say pool_include_prefix (pooling over CLS and registers too); not supported"
        )
    if how == "map":
        return "attention_pool", "pooled" if head else "none"
    if how == "avg":
        normed = "fc_norm.weight" in shapes
        return "layernormed_mean_patch_tokens" if normed else "mean_patch_tokens", "pooled" if head else "none"
    if how == "token" and "cls_token" not in shapes:
        raise CheckpointError(
            "config.json: global_pool 'token' reads the CLS token, and there is no cls_token; say how these weights "
            'pool, such as "global_pool": "avg"'
        )
    if how == "token" and "fc_norm.weight" in shapes:
        return "layernormed_cls", "pooled" if head else "none"
    if how == "token":
        return "mean_patch_tokens", "cls" if head else "none"
    raise CheckpointError(f"config.json: global_pool {how!r} is not supported; known are token, avg and map")


def is_clip_embedding(config: Config, width: int) -> bool:
    """Whether the head of a CLIP tower is its projection into the space shared with text, not a classifier.

    A tower of a width that none was published with may project into any of these spaces.
    """
    published = config.get("pretrained_cfg") or {}
    spaces = [CLIP_WIDTHS[width]] if width in CLIP_WIDTHS else CLIP_WIDTHS.values()
    if "_clip_" not in str(config["architecture"]) or config.get("num_classes") not in spaces:
        return False
    if config.get("label_names") or published.get("label_names"):
        return False
    return not re.search(r"_ft_|in1k|in12k|in22k", str(published.get("tag", "")))


def positions(shapes: Shapes, patches: int) -> Positions:
    """Which tokens the position table covers, from its length."""
    rows = shapes.get("pos_embed", (1, 0, 0))[1]
    prefix = ("cls_token" in shapes) + ("dist_token" in shapes)
    registers = shapes.get("reg_token", (1, 0, 0))[1]
    if rows == 0:
        return "none"
    if rows == patches:
        return "patches"
    return "all_and_registers" if registers and rows == patches + prefix + registers else "all"


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """DeiT-3 as published spells LayerScale `gamma_1`."""
    if "blocks.0.gamma_1" not in shapes:
        return SPELLING
    return {**SPELLING, "blocks.{i}.scale1": "blocks.{i}.gamma_1", "blocks.{i}.scale2": "blocks.{i}.gamma_2"}


FORMAT = Format(
    family="vit",
    layout="timm",
    examples="timm/vit_base_patch16_224.augreg2_in21k_ft_in1k, timm/vit_large_patch14_reg4_dinov2.lvd142m",
    test="tests/models/test_models_timm.py",
    recognise=timm.by_architecture(r"(vit|deit|deit3|flexivit|eva_large)_", "patch_embed.proj.weight"),
    architecture=architecture,
    spell=spell,
    ignored=(r"mask_token", r"pre_logits\..*", r"decoder.*"),
)
