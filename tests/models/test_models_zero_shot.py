"""Zero-shot classification with LiT: the same probabilities as NumPy computes from the arrays."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import lit
from support.checkpoints import worst_error
from support.testdata import needs_testdata, photos

from pipeline.models import inspect_model, load_model, load_text, with_labels
from schemas.errors import CheckpointError, SpecError

LABELS = ("dog", "cat", "red house")
TEMPLATES = ("a photo of a {}.", "the {}!")


def bert_ids(text: str) -> list[int]:
    """[CLS], a word each, zeros: what is in the texts here needs no more."""
    spaced = text.replace(".", " .").replace("!", " !")
    found = [lit.WORDS.index("[CLS]"), *(lit.WORDS.index(word) for word in spaced.split())]
    return (found + [0] * lit.LENGTH)[: lit.LENGTH]


def piece_ids(path: Path, text: str) -> list[int]:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    end = pieces.piece_to_id("</s>")
    return [*pieces.encode(text)[: lit.LENGTH - 1], *[end] * lit.LENGTH][: lit.LENGTH]


def classes(arrays: lit.Arrays, ids: Any) -> lit.Array:
    """The mean direction over the templates."""
    return lit.unit(sum(lit.texts(arrays, [ids(t.replace("{}", label)) for label in LABELS]) for t in TEMPLATES))


def photographs(count: int) -> lit.Array:
    from PIL import Image

    files = [Image.open(path).convert("RGB").resize((lit.SIZE, lit.SIZE)) for path in photos(count)]
    return np.stack([np.asarray(image) for image in files])


@pytest.fixture(params=["bert", "transformer"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, lit.Arrays, Any]:
    """A checkpoint with its vocabulary beside it, its arrays, and its tokenizer once more."""
    if request.param == "bert":
        lit.write_words(tmp_path / "LiT-X.txt")
        arrays, ids = lit.random_pair("bert"), bert_ids
    else:
        path = lit.train_pieces(tmp_path / "LiT-X.model")
        arrays = lit.random_pair("transformer", vocabulary=64, projected=False)

        def ids(text: str) -> list[int]:
            return piece_ids(path, text)

    np.savez(tmp_path / "LiT-X.npz", **arrays)
    return tmp_path / "LiT-X.npz", arrays, ids


@needs_testdata
def test_matches_numpy(pair: tuple[Path, lit.Arrays, Any]) -> None:
    path, arrays, ids = pair
    info = inspect_model(str(path))
    assert info.num_labels == 0
    pixels = photographs(6)
    vectors = load_model(info)(torch.from_numpy(pixels))
    embedded = lit.images(arrays, pixels)
    assert worst_error(torch.nn.functional.normalize(vectors.pooled), torch.from_numpy(embedded)) < 1e-5
    chosen = with_labels(info, LABELS, TEMPLATES)
    assert (chosen.labels, chosen.num_labels, chosen.multi_label) == (LABELS, 3, False)
    outputs = load_model(chosen)(torch.from_numpy(pixels))
    assert worst_error(outputs.pooled, vectors.pooled) < 1e-6
    assert outputs.logits is not None
    expected = lit.probabilities(arrays, pixels, classes(arrays, ids))
    found = outputs.logits.softmax(1)
    assert worst_error(found, torch.from_numpy(expected)) < 1e-5
    assert expected.max() - expected.min() > 0.2, "the check could not fail"
    alone = load_model(chosen, outputs=("logits",))(torch.from_numpy(pixels))
    assert worst_error(alone.logits, outputs.logits) < 1e-5  # from the CLS token alone
    low = load_model(chosen, dtype=torch.bfloat16)(torch.from_numpy(pixels)).logits
    assert low is not None
    assert worst_error(low.softmax(1), torch.from_numpy(expected)) < 0.05


def test_texts_match_numpy(pair: tuple[Path, lit.Arrays, Any]) -> None:
    path, arrays, ids = pair
    texts = [
        "a photo of a dog.",
        "the red house",
        "a",
        "the cat of the dog of the cat of the dog of the red house of a cat",
    ]
    vectors = load_text(inspect_model(str(path))).embed(texts)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, lit.texts(arrays, [ids(text) for text in texts]), atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01


def test_a_single_label_needs_another_to_be_told_from(tmp_path: Path) -> None:
    arrays = lit.random_pair("bert")
    lit.write_words(tmp_path / "vocab.txt")
    np.savez(tmp_path / "model.npz", **arrays)
    with pytest.raises(SpecError, match=r"'a dog' alone would have the score 1 in every picture.*'something else'"):
        with_labels(inspect_model(str(tmp_path)), ["a dog"])
    np.savez(tmp_path / "model.npz", **arrays, **{"params/b": np.array([-1.5], np.float32)})
    assert with_labels(inspect_model(str(tmp_path)), ["a dog"]).multi_label, "a sigmoid says how likely it is"


@pytest.mark.parametrize("prefix", ["params/", "opt/target/", ""])
def test_other_prefixes(prefix: str, tmp_path: Path) -> None:
    arrays = lit.random_pair("bert")
    lit.write_words(tmp_path / "vocab.txt")
    np.savez(tmp_path / "model.npz", **{name.replace("params/", prefix): array for name, array in arrays.items()})
    vectors = load_text(inspect_model(str(tmp_path))).embed(["a dog"])
    np.testing.assert_allclose(vectors, lit.texts(arrays, [bert_ids("a dog")]), atol=1e-5)


def test_big_vision_stacks_its_blocks(tmp_path: Path) -> None:
    arrays = lit.random_pair("transformer", vocabulary=64)
    pieces = lit.train_pieces(tmp_path / "pieces.model")
    stacked: lit.Arrays = {}
    for name, array in arrays.items():
        if "encoderblock_0" in name:
            blocks = [arrays[name.replace("encoderblock_0", f"encoderblock_{i}")] for i in range(lit.DEPTH)]
            stacked[name.replace("encoderblock_0", "encoderblock")] = np.stack(blocks)
        elif "encoderblock_" not in name:
            stacked[name] = array
    np.savez(tmp_path / "model.npz", **stacked, **{"params/b": np.array([-1.5], np.float32)})
    info = with_labels(inspect_model(str(tmp_path)), LABELS, vocabulary=str(pieces))
    assert info.multi_label
    assert info.zero_shot is not None
    assert info.zero_shot.bias == -1.5
    np.testing.assert_allclose(
        np.frombuffer(info.zero_shot.weights, np.float32).reshape(3, -1),
        lit.texts(arrays, [piece_ids(pieces, f"a photo of a {label}") for label in LABELS]),
        atol=1e-5,
    )


def test_digest_tells_labels_templates_and_vocabularies_apart(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", **lit.random_pair("bert"))
    words = lit.write_words(tmp_path / "vocab.txt")
    other = tmp_path / "other.txt"
    other.write_text(words.read_text().replace("house", "mouse"))
    info = inspect_model(str(tmp_path))
    cases: list[tuple[Sequence[str], Sequence[str] | None, str | None]] = [
        (LABELS, None, None),
        (LABELS[::-1], None, None),
        (LABELS, ("a {}",), None),
        (LABELS, None, str(other)),
    ]
    digests = {with_labels(info, *case).zero_shot.digest for case in cases}  # type: ignore[union-attr]
    assert len(digests) == len(cases)
    assert with_labels(info, LABELS).zero_shot == with_labels(info, [f" {label} " for label in LABELS]).zero_shot


@pytest.mark.parametrize(
    ("labels", "templates", "said"),
    [
        ((), None, "at least one of them"),
        (("dog", " "), None, "none of them empty"),
        (("dog", "cat", "dog "), None, "'dog' stands there twice, as labels 1 and 3"),
        (("dog",), ("a photo",), "0 places for the label"),
        (("dog",), ("{} and {}",), "2 places for the label"),
    ],
)
def test_labels_that_cannot_be(
    labels: Sequence[str], templates: Sequence[str] | None, said: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "model.npz", **lit.random_pair("bert"))
    lit.write_words(tmp_path / "vocab.txt")
    with pytest.raises(SpecError, match=said) as caught:
        with_labels(inspect_model(str(tmp_path)), labels, templates)
    assert caught.value.exit_code == 2


def test_refusals(tmp_path: Path) -> None:
    arrays = lit.random_pair("bert")
    path = tmp_path / "model.npz"
    np.savez(path, **arrays)
    info = inspect_model(str(path))
    with pytest.raises(SpecError, match=r"no vocabulary beside it.*--vocabulary"):
        load_text(info)
    with pytest.raises(SpecError, match=r"expected a file tokenizer\.json"):
        load_text(info, str(tmp_path / "gone.txt"))
    with pytest.raises(SpecError, match=r"s3://b/vocab\.txt: a vocabulary is read from a disk\. Copy it .*beside"):
        load_text(info, "s3://b/vocab.txt")
    bad = tmp_path / "bad.txt"
    bad.write_text("one\ntwo\n")
    with pytest.raises(CheckpointError, match="no BERT vocabulary"):
        load_text(info, str(bad))
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="no sentencepiece model"):
        load_text(info, str(tmp_path / "bad.model"))
    lit.write_words(bad)
    bad.write_text(bad.read_text() + "zebra\n")
    with pytest.raises(CheckpointError, match="has a token 15, but the text tower knows 15"):
        load_text(info, str(bad)).embed(["zebra"])
    gone = "params/txt/BertEncoder_0/encoder_block/layer_sequence/layers_1/mlp_block/layer_norm/bias"
    np.savez(
        path, **{name: array for name, array in arrays.items() if name != gone}, **{"params/txt/odd": arrays[gone]}
    )
    with pytest.raises(CheckpointError, match=r"1 missing: txt/Bert.*layers_1/mlp_block/layer_norm/bias") as found:
        load_text(inspect_model(str(path)), str(bad))
    assert "1 unexpected: txt/odd" in str(found.value)
    assert "its text tower taken for LiT text, BERT" in str(found.value)
    np.savez(path, **{name: array for name, array in arrays.items() if name != "params/t"})
    with pytest.raises(CheckpointError, match="t is missing"):
        load_text(inspect_model(str(path)), str(bad))


def test_model_without_a_text_tower(tmp_path: Path) -> None:
    arrays = lit.random_pair("bert")
    np.savez(tmp_path / "model.npz", **{name: array for name, array in arrays.items() if "txt" not in name})
    with pytest.raises(SpecError, match="has no text tower"):
        load_text(inspect_model(str(tmp_path)))


def test_travels_to_the_actors(tmp_path: Path) -> None:
    import pickle

    np.savez(tmp_path / "model.npz", **lit.random_pair("bert"))
    lit.write_words(tmp_path / "vocab.txt")
    info = with_labels(inspect_model(str(tmp_path)), LABELS)
    assert pickle.loads(pickle.dumps(info)) == info
    assert replace(info, zero_shot=None) != info
