"""A random LiT pair as `.npz`, its vocabularies, and what it computes, in NumPy alone.

The transformer is written out here once more, from vision_transformer's `models_vit.py` and `models_lit.py` and
flaxformer's BERT, on the arrays under their own names: it shares no code with the package.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]

WIDTH, HEADS, DEPTH, MLP, PATCH, SIZE, SHARED = 48, 4, 3, 96, 16, 64, 40
TEXT_WIDTH, TEXT_HEADS, LENGTH = 64, 1, 16
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "the", ".", ",", "dog", "cat", "house", "red", "!")


def random_pair(text: str, *, projected: bool = True, vocabulary: int = 0) -> Arrays:
    """Arrays of an image tower and a `bert` or `transformer` text tower, under `params/`."""
    generator = np.random.default_rng(7)

    def normal(*shape: int, std: float = 0.0, mean: float = 0.0) -> Array:
        std = std or 1 / np.prod(shape[:-1]) ** 0.5
        return (mean + std * generator.standard_normal(shape)).astype(np.float32)

    def norm(name: str, width: int) -> Arrays:
        return {f"{name}/scale": normal(width, std=0.3, mean=1), f"{name}/bias": normal(width, std=0.3)}

    def dense(name: str, *shape: int, out: int = 1) -> Arrays:
        kernel = normal(*shape, std=1 / np.prod(shape[:-out]) ** 0.5)
        return {f"{name}/kernel": kernel, f"{name}/bias": normal(*shape[-out:], std=0.3)}

    def encoder(start: str, width: int, heads: int) -> Arrays:
        arrays = norm(f"{start}encoder_norm", width)
        for i in range(DEPTH):
            block = f"{start}encoderblock_{i}/"
            arrays |= norm(f"{block}LayerNorm_0", width) | norm(f"{block}LayerNorm_1", width)
            for name in ("query", "key", "value"):
                attention = f"{block}MultiHeadDotProductAttention_0/"
                arrays |= dense(f"{attention}{name}", width, heads, width // heads, out=2)
            arrays |= dense(f"{attention}out", heads, width // heads, width)
            arrays |= dense(f"{block}MlpBlock_0/Dense_0", width, MLP) | dense(f"{block}MlpBlock_0/Dense_1", MLP, width)
        return arrays

    def bert(start: str, width: int) -> Arrays:
        arrays = norm(f"{start}layer_norm", width)
        for name, rows in (("token", vocabulary or len(WORDS)), ("position", 32), ("segment", 2)):
            arrays[f"{start}embedder/embedders_{name}_ids/embedding"] = normal(rows, width, std=1)
        for i in range(DEPTH):
            layer = f"{start}encoder_block/layer_sequence/layers_{i}/"
            for name in ("attention_layer/query", "attention_layer/key", "attention_layer/value", "dense_layer"):
                arrays |= dense(f"{layer}attention_block/{name}", width, width)
            arrays |= dense(f"{layer}mlp_block/mlp/dense_layer", width, MLP)
            arrays |= dense(f"{layer}mlp_block/dense_layer", MLP, width)
            arrays |= norm(f"{layer}attention_block/layer_norm", width) | norm(f"{layer}mlp_block/layer_norm", width)
        return arrays

    image = {
        "img/cls": normal(1, 1, WIDTH, std=1),
        **dense("img/embedding", PATCH, PATCH, 3, WIDTH),
        "img/Transformer/posembed_input/pos_embedding": normal(1, 1 + (SIZE // PATCH) ** 2, WIDTH, std=0.5),
        **encoder("img/Transformer/", WIDTH, HEADS),
        **(dense("img/head", WIDTH, SHARED) if projected else {}),
    }
    words = dense("txt/head", TEXT_WIDTH, SHARED if projected else WIDTH)
    if text == "bert":
        words |= bert("txt/BertEncoder_0/", TEXT_WIDTH)
    else:
        words |= {"txt/Embed_0/embedding": normal(vocabulary, TEXT_WIDTH, std=1)}
        words |= {"txt/pos_embedding": normal(1, LENGTH, TEXT_WIDTH, std=0.5)}
        words |= encoder("txt/Encoder_0/", TEXT_WIDTH, TEXT_HEADS)
    return {f"params/{name}": array for name, array in (image | words | {"t": np.array([4.0], np.float32)}).items()}


def gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))))


def layer_norm(p: Arrays, name: str, x: Array, epsilon: float) -> Array:
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return np.asarray(y * p[f"{name}/scale"] + p[f"{name}/bias"])


def attention(q: Array, k: Array, v: Array, seen: Array | None) -> Array:
    """q, k, v (B, T, heads, d) → (B, T, heads, d); `seen` (B, T)."""
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    if seen is not None:
        scores = np.where(seen[:, None, None, :], scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def encode(p: Arrays, start: str, x: Array) -> Array:
    """vision_transformer's Encoder."""
    for i in range(DEPTH):
        block = f"{start}encoderblock_{i}/"
        y, a = layer_norm(p, f"{block}LayerNorm_0", x, 1e-6), f"{block}MultiHeadDotProductAttention_0/"
        q, k, v = (
            np.einsum("btd,dhe->bthe", y, p[f"{a}{name}/kernel"]) + p[f"{a}{name}/bias"]
            for name in ("query", "key", "value")
        )
        x = x + np.einsum("bthe,hed->btd", attention(q, k, v, None), p[f"{a}out/kernel"]) + p[f"{a}out/bias"]
        y = layer_norm(p, f"{block}LayerNorm_1", x, 1e-6)
        for number in (0, 1):
            dense = f"{block}MlpBlock_0/Dense_{number}"
            y = y @ p[f"{dense}/kernel"] + p[f"{dense}/bias"]
            y = y if number else gelu(y)
        x = x + y
    return layer_norm(p, f"{start}encoder_norm", x, 1e-6)


def images(arrays: Arrays, pixels: Array) -> Array:
    """Embeddings of uint8 pixels (B, H, W, 3), of length 1."""
    p = {name.removeprefix("params/"): np.asarray(array, np.float64) for name, array in arrays.items()}
    b, side = len(pixels), SIZE // PATCH
    values = (pixels / 127.5 - 1).reshape(b, side, PATCH, side, PATCH, 3)
    x = np.einsum("brpcqk,pqkd->brcd", values, p["img/embedding/kernel"]) + p["img/embedding/bias"]
    x = np.concatenate([np.broadcast_to(p["img/cls"], (b, 1, WIDTH)), x.reshape(b, -1, WIDTH)], axis=1)
    x = encode(p, "img/Transformer/", x + p["img/Transformer/posembed_input/pos_embedding"])[:, 0]
    return unit(x @ p["img/head/kernel"] + p["img/head/bias"] if "img/head/kernel" in p else x)


def texts(arrays: Arrays, ids: Sequence[Sequence[int]]) -> Array:
    """Embeddings of texts of 16 token ids, of length 1."""
    p = {name.removeprefix("params/"): np.asarray(array, np.float64) for name, array in arrays.items()}
    tokens = np.array(ids)
    if "txt/Embed_0/embedding" in p:
        x = encode(p, "txt/Encoder_0/", p["txt/Embed_0/embedding"][tokens] + p["txt/pos_embedding"])[:, -1]
    else:
        x = bert_encode(p, "txt/BertEncoder_0/", tokens)[:, 0]
    return unit(x @ p["txt/head/kernel"] + p["txt/head/bias"])


def bert_encode(p: Arrays, start: str, tokens: Array) -> Array:
    """flaxformer's BertEncoder."""
    tables = {name: p[f"{start}embedder/embedders_{name}_ids/embedding"] for name in ("token", "position", "segment")}
    x = tables["token"][tokens] + tables["position"][: tokens.shape[1]] + tables["segment"][0]
    x = layer_norm(p, f"{start}layer_norm", x, 1e-12)
    for i in range(DEPTH):
        layer = f"{start}encoder_block/layer_sequence/layers_{i}/"
        block = f"{layer}attention_block/"
        q, k, v = (
            (x @ p[f"{block}attention_layer/{name}/kernel"] + p[f"{block}attention_layer/{name}/bias"]).reshape(
                *x.shape[:2], TEXT_HEADS, -1
            )
            for name in ("query", "key", "value")
        )
        mixed = attention(q, k, v, tokens != 0).reshape(x.shape)
        y = mixed @ p[f"{block}dense_layer/kernel"] + p[f"{block}dense_layer/bias"]
        x = layer_norm(p, f"{block}layer_norm", x + y, 1e-12)
        block = f"{layer}mlp_block/"
        y = gelu(x @ p[f"{block}mlp/dense_layer/kernel"] + p[f"{block}mlp/dense_layer/bias"])
        y = y @ p[f"{block}dense_layer/kernel"] + p[f"{block}dense_layer/bias"]
        x = layer_norm(p, f"{block}layer_norm", x + y, 1e-12)
    return x


def unit(x: Array) -> Array:
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


def probabilities(arrays: Arrays, pixels: Array, classes: Array) -> Array:
    """Softmax over the classes, whose vectors (L, E) have length 1: (B, L)."""
    scores = np.exp(float(arrays["params/t"][0])) * images(arrays, pixels) @ classes.T
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(weights / weights.sum(1, keepdims=True))


def write_words(path: Path) -> Path:
    """A BERT vocabulary of WORDS."""
    path.write_text("\n".join(WORDS) + "\n")
    return path


def train_pieces(path: Path, **options: Any) -> Path:
    """A small sentencepiece model."""
    import sentencepiece

    sentences = [f"a photo of {article} {noun}." for article in ("a", "the") for noun in ("dog", "cat", "red house")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20), model_writer=model, vocab_size=40, hard_vocab_limit=False,
        minloglevel=2, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path
