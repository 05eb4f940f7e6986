"""The demo's material: pictures repeat with their seed, broken files are broken, the model keeps its promise."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from jobs.demo.draw import CLASSES, draw, write_broken, write_pictures

MODEL = Path(__file__).parents[2] / "jobs" / "demo" / "model"
MODEL_LIMIT_BYTES = 4 * 2**20
UNSEEN_SEED = 987_654_321


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def _class_of(path: Path) -> str:
    return path.stem.rsplit("_", 1)[0].replace("-", " ")


def test_there_are_at_least_24_distinct_classes() -> None:
    assert len(set(CLASSES)) == len(CLASSES) >= 24


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    assert write_pictures(tmp_path / "first", 40, seed=5) == 40
    write_pictures(tmp_path / "again", 40, seed=5)
    write_pictures(tmp_path / "other", 40, seed=6)
    first, other = _digests(tmp_path / "first"), _digests(tmp_path / "other")
    assert len(first) == 40
    assert first == _digests(tmp_path / "again")
    assert not set(first.values()) & set(other.values())


def test_a_picture_does_not_depend_on_how_many_are_written(tmp_path: Path) -> None:
    write_pictures(tmp_path / "few", 10, seed=5)
    write_pictures(tmp_path / "more", 20, seed=5)
    assert _digests(tmp_path / "few").items() < _digests(tmp_path / "more").items()


def test_files_are_named_by_class_and_come_in_three_formats(tmp_path: Path) -> None:
    write_pictures(tmp_path, 4 * len(CLASSES), seed=5)
    files = list(tmp_path.iterdir())
    assert {_class_of(path) for path in files} == set(CLASSES)
    formats = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
    assert {path.suffix for path in files} == set(formats)
    for path in files:
        with Image.open(path) as picture:
            assert picture.format == formats[path.suffix]


def test_pictures_vary_in_size_and_shape() -> None:
    sizes = [draw(0, np.random.default_rng(number)).size for number in range(60)]
    sides = [side for size in sizes for side in size]
    aspects = [width / height for width, height in sizes]
    assert 160 <= min(sides) < 200
    assert 480 < max(sides) <= 640
    assert min(aspects) < 0.8
    assert max(aspects) > 1.25


@pytest.mark.parametrize("class_index", range(len(CLASSES)))
def test_a_shape_is_drawn_in_the_colour_of_its_label(class_index: int) -> None:
    hue_of = {"red": 0, "yellow": 51, "green": 130, "blue": 217, "purple": 287}[CLASSES[class_index].split()[0]]
    for number in range(5):
        hsv = np.asarray(draw(class_index, np.random.default_rng([number, 3])).convert("HSV"), dtype=np.int32)
        vivid = hsv[(hsv[..., 1] > 150) & (hsv[..., 2] > 110)]
        distance = np.abs((vivid[:, 0] * 360 / 255 - hue_of + 180) % 360 - 180)
        assert len(vivid) > 0.02 * hsv[..., 0].size
        assert np.mean(distance < 25) > 0.95


def test_broken_files_are_broken_each_in_its_way(tmp_path: Path) -> None:
    expected: dict[str, tuple[type[Exception], str]] = {
        "broken-truncated.jpg": (OSError, "truncated"),
        "broken-empty.jpg": (UnidentifiedImageError, "cannot identify"),
        "broken-text.png": (UnidentifiedImageError, "cannot identify"),
        "broken-bomb.png": (Image.DecompressionBombError, "3600000000 pixels"),
        "broken-damaged.png": (OSError, "broken|unrecognized|corrupt"),
        "broken-zeros.webp": (UnidentifiedImageError, "cannot identify"),
    }
    assert write_broken(tmp_path) == len(expected)
    assert {path.name for path in tmp_path.iterdir()} == set(expected)
    for name, (error, message) in expected.items():
        with pytest.raises(error, match=message), Image.open(tmp_path / name) as picture:
            picture.load()
    assert (tmp_path / "broken-bomb.png").stat().st_size < 10_000
    assert (tmp_path / "broken-empty.jpg").stat().st_size == 0


def test_the_model_is_small_and_labelled_with_the_classes() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= MODEL_LIMIT_BYTES
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert [config["id2label"][str(index)] for index in range(len(CLASSES))] == list(CLASSES)


@pytest.mark.slow
def test_the_model_labels_fresh_pictures(tmp_path: Path) -> None:
    """Through transformers and Pillow, so that a fault of the package's own model code cannot hide one of the model."""
    import torch
    from support.checkpoints import transformers

    write_pictures(tmp_path, 20 * len(CLASSES), seed=UNSEEN_SEED)
    preprocessor = json.loads((MODEL / "preprocessor_config.json").read_text(encoding="utf-8"))
    size = (preprocessor["size"]["width"], preprocessor["size"]["height"])
    files = sorted(tmp_path.iterdir())
    pixels = np.stack(
        [np.asarray(Image.open(path).convert("RGB").resize(size, Image.Resampling.BILINEAR)) for path in files]
    )
    model = transformers.ViTForImageClassification.from_pretrained(MODEL).eval()
    with torch.inference_mode():
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        predicted = torch.cat([model(pixel_values=part).logits.argmax(-1) for part in batch.split(100)])
    right = [
        model.config.id2label[index] == _class_of(path) for index, path in zip(predicted.tolist(), files, strict=True)
    ]
    assert np.mean(right) >= 0.95
