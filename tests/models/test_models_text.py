"""The text towers of CLIP and SigLIP against transformers, and zero-shot scores against its whole models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from support import lit
from support.checkpoints import SIZES, preprocessed, spread_out, transformers, worst_error
from support.testdata import needs_testdata, photos
from tokenizers import models, pre_tokenizers, processors

from pipeline.models import inspect_model, load_model, load_text, with_labels
from schemas.errors import CheckpointError, SpecError

WORDS = ["<pad>", "<unk>", "<bos>", "<eos>", *["a", "photo", "of", "the", ".", "dog", "cat", "red", "house", "bird"]]
LABELS = ("dog", "red house", "bird")
TEXTS = ["a photo of a dog.", "the red house of the bird", "a cat", "a dog " * 40]
TOWER = {**SIZES["small"], "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def write_tokenizer(folder: Path, *, begin: str) -> None:
    """A word is a token; `begin` in front of a text and <eos> behind it, as post-processors put them."""
    words = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<bos>", 2), ("<eos>", 3)]
    words.post_processor = processors.TemplateProcessing(single=f"{begin} $A <eos>".strip(), special_tokens=special)
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))


def make(folder: Path, kind: str, **text: Any) -> Any:
    """A whole model with random weights, its processor and its tokenizer; returns the model."""
    given, vision = {**TOWER, **text}, {**SIZES["small"], "image_size": 64, "patch_size": 16}
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=given, vision_config=vision, projection_dim=40)
        model, processor = transformers.CLIPModel(config), transformers.CLIPImageProcessorPil
        processor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(folder)
    else:
        config = transformers.SiglipConfig(text_config={**given, "projection_size": 96}, vision_config=vision)
        model, processor = transformers.SiglipModel(config), transformers.SiglipImageProcessorPil
        processor(size={"height": 64, "width": 64}).save_pretrained(folder)
    spread_out(model.eval(), seed=3)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    model.save_pretrained(folder)
    write_tokenizer(folder, begin="<bos>" if kind == "clip" else "")
    return model


def ids(kind: str, text: str, length: int) -> list[int]:
    """As transformers' tokenizers fill up: the end token stays where a text is cut."""
    words = text.replace(".", " .").split()
    start = [2] if kind == "clip" else []
    inside = [WORDS.index(word) for word in words][: length - 1 - len(start)]
    return ([*start, *inside, 3] + [0] * length)[:length]


def reference_texts(model: Any, kind: str, texts: list[str]) -> torch.Tensor:
    length = model.config.text_config.max_position_embeddings
    tokens = torch.tensor([ids(kind, text, length) for text in texts])
    with torch.no_grad():
        output = model.get_text_features(input_ids=tokens)
    embedded: torch.Tensor = getattr(output, "pooler_output", output)
    return torch.nn.functional.normalize(embedded)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_match_transformers(kind: str, tmp_path: Path) -> None:
    model = make(tmp_path, kind, max_position_embeddings=24)
    ours = torch.from_numpy(load_text(inspect_model(str(tmp_path))).embed(TEXTS))
    theirs = reference_texts(model, kind, TEXTS)
    assert worst_error(ours, theirs) < 1e-5
    assert float((theirs[0] - theirs[1]).abs().max()) > 0.01


def test_old_configs_of_clip_end_at_the_highest_token(tmp_path: Path) -> None:
    """Whose `eos_token_id` is 2, whatever the tokenizer ends a text with."""
    model = make(tmp_path, "clip", max_position_embeddings=24, eos_token_id=2)
    ours = torch.from_numpy(load_text(inspect_model(str(tmp_path))).embed(TEXTS))
    assert worst_error(ours, reference_texts(model, "clip", TEXTS)) < 1e-5


@needs_testdata
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_zero_shot_scores_match_transformers(kind: str, tmp_path: Path) -> None:
    model = make(tmp_path, kind, max_position_embeddings=24)
    pixels, values = preprocessed(tmp_path, photos(4))
    texts = [f"a photo of a {label}." for label in LABELS]
    tokens = torch.tensor([ids(kind, text, 24) for text in texts])
    with torch.no_grad():
        logits = model(input_ids=tokens, pixel_values=values).logits_per_image
    info = with_labels(inspect_model(str(tmp_path)), LABELS)
    assert info.multi_label == (kind == "siglip")
    outputs = load_model(info)(pixels)
    assert outputs.logits is not None
    assert worst_error(outputs.logits, logits) < 1e-4
    probabilities = outputs.logits.sigmoid() if info.multi_label else outputs.logits.softmax(1)
    theirs = logits.sigmoid() if kind == "siglip" else logits.softmax(1)
    assert worst_error(probabilities, theirs) < 1e-4
    assert float(theirs.max() - theirs.min()) > 0.1


def test_sentencepiece_of_siglip_as_transformers_cuts(tmp_path: Path) -> None:
    """With spiece.model alone: lower case and no punctuation, whatever the model itself would make of them."""
    make(tmp_path, "siglip", max_position_embeddings=24)
    (tmp_path / "tokenizer.json").unlink()
    pieces = lit.train_pieces(tmp_path / "spiece.model")
    theirs = transformers.SiglipTokenizer(vocab_file=str(pieces))
    texts = ["a photo of a dog.", "The  RED house!  (of a dog)", "a dog " * 40, ""]
    expected = theirs(texts, padding="max_length", max_length=24, truncation=True)["input_ids"]
    assert load_text(inspect_model(str(tmp_path))).tokenizer(texts).tolist() == expected


def test_lower_case_where_the_config_says_so_and_the_tokenizer_does_not(tmp_path: Path) -> None:
    """As the published SigLIP 2."""
    make(tmp_path, "siglip", max_position_embeddings=24)
    encode = load_text(inspect_model(str(tmp_path))).tokenizer
    assert encode(["A DOG"]).tolist() != encode(["a dog"]).tolist()
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_lower_case": True}))
    encode = load_text(inspect_model(str(tmp_path))).tokenizer
    assert encode(["A DOG"]).tolist() == encode(["a dog"]).tolist()


def test_sentencepiece_of_gemma_ends_and_pads_as_gemma_does(tmp_path: Path) -> None:
    """SigLIP 2 in google's own layout: `<eos>` once, then `<pad>`; lower case, punctuation kept."""
    make(tmp_path, "siglip", max_position_embeddings=24)
    (tmp_path / "tokenizer.json").unlink()
    pieces = lit.train_pieces(tmp_path / "spiece.model", pad_id=0, eos_id=1, bos_id=2, unk_id=3, eos_piece="<eos>")
    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    (found,) = load_text(inspect_model(str(tmp_path))).tokenizer(["A photo of a DOG."]).tolist()
    inside = own.encode("a photo of a dog.")
    assert found == [*inside, 1, *[0] * (23 - len(inside))]
    (cut,) = load_text(inspect_model(str(tmp_path))).tokenizer(["a dog " * 40]).tolist()
    assert cut[-1] == 1


def test_padding_of_siglip_must_be_said(tmp_path: Path) -> None:
    make(tmp_path, "siglip", max_position_embeddings=24)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="which token pads a text is not said"):
        load_text(inspect_model(str(tmp_path)))


def test_image_tower_alone_has_no_texts(tmp_path: Path) -> None:
    make(tmp_path, "clip", max_position_embeddings=24).vision_model.save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"has no text tower; texts need one of CLIP, SigLIP or LiT"):
        load_text(inspect_model(str(tmp_path)))


def test_broken_towers_are_listed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make(tmp_path, "clip", max_position_embeddings=24)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["text_model.final_layer_norm.bias"] = torch.zeros(95)
    del tensors["text_model.encoder.layers.1.mlp.fc1.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    info = inspect_model(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"1 missing: text_model.encoder.layers.1.mlp.fc1.bias \[192\]") as found:
        load_text(info)
    assert "text_model.final_layer_norm.bias: [95], expected [96]" in str(found.value)
    make(tmp_path / "whole", "clip", max_position_embeddings=24)
    (tmp_path / "whole" / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json that can be read"):
        load_text(inspect_model(str(tmp_path / "whole")))


def test_a_depth_that_the_tensors_do_not_have(tmp_path: Path) -> None:
    make(tmp_path, "clip", max_position_embeddings=24)
    info = inspect_model(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1000
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=": 1000 blocks, but "):
        load_text(info)


def test_a_text_config_of_another_form(tmp_path: Path) -> None:
    make(tmp_path, "clip", max_position_embeddings=24)
    info = inspect_model(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": [1]}))
    with pytest.raises(CheckpointError, match=r"config are not those of clip text \(TypeError: "):
        load_text(info)


def test_default_template_is_that_of_clip(tmp_path: Path) -> None:
    make(tmp_path, "clip", max_position_embeddings=24)
    info = inspect_model(str(tmp_path))
    plain = with_labels(info, LABELS).zero_shot
    said = with_labels(info, LABELS, ["a photo of a {}."]).zero_shot
    assert plain == said
    assert plain is not None
    vectors = np.frombuffer(plain.weights, np.float32).reshape(3, 40)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
