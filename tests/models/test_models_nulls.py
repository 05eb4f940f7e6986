"""A config in which a value is null: the checkpoint is described without it, or refused by an error that says so."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import make_checkpoint, make_timm_checkpoint, transformers

from pipeline.models import inspect_model
from pipeline.models.zero_shot import inspect_text
from schemas.errors import CheckpointError

TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
IMAGES = {**TOWER, "image_size": 32}
TIMM = {"embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 3}
FILES = ("config.json", "preprocessor_config.json")


def make(folder: Path, kind: str) -> Path:
    """A small checkpoint; "clip" and "siglip" with both towers."""
    if kind in ("vit_base_patch16_224", "beit_base_patch16_224", "vit_base_patch16_clip_224"):
        make_timm_checkpoint(folder, kind, **TIMM)
        return folder
    make_checkpoint(folder, kind, **IMAGES)
    if kind in ("clip", "siglip"):
        name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
        texts = {**TOWER, "vocab_size": 64, "eos_token_id": 3, "projection_size": 32}
        config = getattr(transformers, f"{name}Config")(text_config=texts, vision_config=IMAGES, projection_dim=32)
        getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    return folder


def places(values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The keys of an object, and of the objects in it."""
    for key, value in values.items():
        yield (key,)
        yield from ((key, *inside) for inside in places(value)) if isinstance(value, dict) else ()


def set_null(path: Path, place: tuple[str, ...]) -> None:
    values = inside = json.loads(path.read_text())
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = None
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "kind",
    [
        *("vit-classifier", "beit-classifier", "deit-classifier", "data2vec-classifier", "mae", "clip", "siglip"),
        *("dinov2-classifier", "dinov2-registers", "clip-projection"),
        *("vit_base_patch16_224", "beit_base_patch16_224", "vit_base_patch16_clip_224"),
    ],
)
def test_any_value_may_be_null(kind: str, tmp_path: Path) -> None:
    folder = make(tmp_path, kind)
    for path in (folder / name for name in FILES if (folder / name).is_file()):
        whole = path.read_text()
        for place in places(json.loads(whole)):
            set_null(path, place)
            try:
                inspect_text(inspect_model(str(folder)))
            except CheckpointError:
                pass
            except Exception as error:
                raise AssertionError(f"{path.name}: {place} is null") from error
            path.write_text(whole)


@pytest.mark.parametrize(
    ("kind", "place", "said"),
    [
        ("clip", ("text_config", "eos_token_id"), "eos_token_id is None; expected a whole number, 0 or more"),
        ("dinov2-classifier", ("mlp_ratio",), "mlp_ratio is None; expected a number above 0"),
        ("dinov2-classifier", ("hidden_size",), "hidden_size is None; expected a whole number above 0"),
        ("dinov2-registers", ("num_register_tokens",), "num_register_tokens is None; expected a whole number"),
        ("vit_base_patch16_224", ("pretrained_cfg",), "pretrained_cfg lacks input_size, interpolation, mean, std"),
        ("vit_base_patch16_224", ("pretrained_cfg", "mean"), "pretrained_cfg lacks mean"),
    ],
)
def test_a_null_that_cannot_be_is_named(kind: str, place: tuple[str, ...], said: str, tmp_path: Path) -> None:
    folder = make(tmp_path, kind)
    set_null(folder / "config.json", place)
    with pytest.raises(CheckpointError, match=said):
        inspect_text(inspect_model(str(folder)))


def test_a_text_that_ends_in_one_of_several_tokens_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path, "clip") / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["eos_token_id"] = [3, 4]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"eos_token_id is \[3, 4\]; expected a whole number"):
        inspect_text(inspect_model(str(tmp_path)))
