"""Text towers beside the image tower in google-research's `.npz`: LiT, and big_vision's SigLIP.

Two kinds: a pre-norm transformer read at its last token (LiT-L16S, LiT-L16Ti, SigLIP), and BERT as flaxformer spells
it, read at its first (LiT-B16B, LiT-L16L). Both end in a dense `head`, and both use flax's GELU, the tanh
approximation: no other library runs these weights. BERT's texts have 16 tokens, of the 512 that its table has
positions for.
"""

import re
from typing import Any

from pipeline.models.formats import npz_vit
from pipeline.models.formats.format import Config, Shapes, Spelling
from pipeline.models.text_architecture import TextArchitecture, TextFormat
from schemas.errors import CheckpointError

LENGTH = 16
HEAD_WIDTH = 64
BLOCK = "txt/Encoder_0/encoderblock_{i}/"
BERT = "txt/BertEncoder_0/"
LAYER = f"{BERT}encoder_block/layer_sequence/layers_{{i}}/"
MLP = re.compile(r"txt/(Encoder_0/encoderblock_0/MlpBlock_0/Dense_0|.*/layers_0/mlp_block/mlp/dense_layer)/kernel")


def _depth(shapes: Shapes, template: str) -> int:
    pattern = re.escape(template).replace(re.escape("{i}"), r"(\d+)")
    return 1 + max((int(found[1]) for name in shapes if (found := re.match(pattern, name))), default=-1)


def _sizes(shapes: Shapes, tokens: str, positions: str) -> dict[str, Any]:
    absent = [name for name in (tokens, positions, "txt/head/kernel") if name not in shapes]
    mlp = [shape[0] for name, shape in shapes.items() if MLP.fullmatch(name)]
    if absent or not mlp:
        raise CheckpointError(f"{', '.join(absent) or 'the MLP of block 0'}: missing, so the text tower has no sizes")
    return {
        "vocabulary": shapes[tokens][0],
        "width": shapes[tokens][-1],
        "position_rows": shapes[positions][-2],
        "mlp_width": mlp[0],
        "projection_width": shapes["txt/head/kernel"][0],
    }


def _heads(config: Config, width: int) -> int:
    """From a kernel (D, heads, head_dim); flaxformer's are flat, and BERT's heads 64 wide."""
    for name, shape in config["raw_shapes"].items():
        if "txt/" in name and name.endswith("query/kernel") and len(shape) >= 3:
            return int(shape[-2])
    return width // HEAD_WIDTH


def transformer(config: Config, shapes: Shapes) -> TextArchitecture:
    """From the arrays alone."""
    sizes = _sizes(shapes, "txt/Embed_0/embedding", "txt/pos_embedding")
    return TextArchitecture(
        **sizes,
        depth=_depth(shapes, BLOCK),
        heads=_heads(config, sizes["width"]),
        length=sizes["position_rows"],
        epsilon=1e-6,
        activation="gelu_tanh",
        read="last",
        sigmoid="b" in shapes,
    )


def spell_transformer(a: TextArchitecture, shapes: Shapes) -> Spelling:
    """Blocks as in big_vision's ViT."""
    attention = f"{BLOCK}MultiHeadDotProductAttention_0/"
    modules: dict[str, str | tuple[str, ...]] = {
        "blocks.{i}.qkv": tuple(f"{attention}{name}" for name in ("query", "key", "value")),
        "blocks.{i}.out": f"{attention}out",
        "blocks.{i}.fc1": f"{BLOCK}MlpBlock_0/Dense_0",
        "blocks.{i}.fc2": f"{BLOCK}MlpBlock_0/Dense_1",
        "projection": "txt/head",
    }
    norms = {
        "blocks.{i}.norm1": f"{BLOCK}LayerNorm_0",
        "blocks.{i}.norm2": f"{BLOCK}LayerNorm_1",
        "norm": "txt/Encoder_0/encoder_norm",
    }
    tables = {"tokens": "txt/Embed_0/embedding", "positions": "txt/pos_embedding"}
    return {**tables, **npz_vit.in_flax(modules, norms)}


def bert(config: Config, shapes: Shapes) -> TextArchitecture:
    """From the arrays alone; the epsilon is BERT's."""
    table = f"{BERT}embedder/embedders_{{}}_ids/embedding"
    sizes = _sizes(shapes, table.format("token"), table.format("position"))
    return TextArchitecture(
        **sizes,
        depth=_depth(shapes, LAYER),
        heads=_heads(config, sizes["width"]),
        length=min(LENGTH, sizes["position_rows"]),
        epsilon=1e-12,
        activation="gelu_tanh",
        read="first",
        norm_first=False,
        segments=shapes.get(table.format("segment"), (2,))[0],
        masked=True,
        sigmoid="b" in shapes,
    )


def spell_bert(a: TextArchitecture, shapes: Shapes) -> Spelling:
    """As flaxformer's BertEncoder names its parts."""
    attention = f"{LAYER}attention_block/attention_layer/"
    modules: dict[str, str | tuple[str, ...]] = {
        "blocks.{i}.qkv": tuple(f"{attention}{name}" for name in ("query", "key", "value")),
        "blocks.{i}.out": f"{LAYER}attention_block/dense_layer",
        "blocks.{i}.fc1": f"{LAYER}mlp_block/mlp/dense_layer",
        "blocks.{i}.fc2": f"{LAYER}mlp_block/dense_layer",
        "projection": "txt/head",
    }
    norms = {
        "blocks.{i}.norm1": f"{LAYER}attention_block/layer_norm",
        "blocks.{i}.norm2": f"{LAYER}mlp_block/layer_norm",
        "norm": f"{BERT}layer_norm",
    }
    tables = {
        ours: f"{BERT}embedder/embedders_{theirs}_ids/embedding"
        for ours, theirs in (("tokens", "token"), ("positions", "position"), ("segments", "segment"))
    }
    return {**tables, **npz_vit.in_flax(modules, norms)}


def recognise_transformer(config: Config, shapes: Shapes) -> str:
    """An `.npz` with an embedding of tokens and blocks under `txt/`."""
    return "the .npz has txt/Embed_0" if "raw_shapes" in config and "txt/Embed_0/embedding" in shapes else ""


def recognise_bert(config: Config, shapes: Shapes) -> str:
    """An `.npz` with flaxformer's BERT under `txt/`."""
    found = "raw_shapes" in config and any(name.startswith(BERT) for name in shapes)
    return "the .npz has txt/BertEncoder_0" if found else ""


TRANSFORMER = TextFormat(
    family="LiT text, transformer",
    layout="google-research .npz",
    examples="gs://vit_models/lit/LiT-L16S.npz, gs://big_vision/siglip/webli_en_b16_224_….npz",
    test="tests/models/test_models_zero_shot.py",
    recognise=recognise_transformer,
    architecture=transformer,
    spell=spell_transformer,
    prefix=("txt/",),
    scale="t",
    bias="b",
)
BERT_TOWER = TextFormat(
    family="LiT text, BERT",
    layout="google-research .npz",
    examples="gs://vit_models/lit/LiT-B16B.npz, gs://vit_models/lit/LiT-L16L.npz",
    test="tests/models/test_models_zero_shot.py",
    recognise=recognise_bert,
    architecture=bert,
    spell=spell_bert,
    prefix=("txt/",),
    scale="t",
    bias="b",
)
