"""Photographs through a trained ViT: altered copies find their originals, and planted copies are found."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image, ImageOps
from support.runs import RunContent, write_run
from support.testdata import needs_testdata, photos, trained_vit

from jobs.retrieve import search as search_command
from pipeline.embedding import Embedder
from pipeline.models import inspect_model
from pipeline.retrieval.arrays import Preparation
from pipeline.retrieval.duplicates import find_duplicates
from pipeline.retrieval.nearest import top_k
from pipeline.retrieval.store import FeatureStore
from schemas.errors import CheckpointError, SpecError
from schemas.run import ModelRecord

pytestmark = [pytest.mark.slow, needs_testdata]

_COPIES = 100


def rotated(image: Image.Image) -> tuple[Image.Image, dict[str, object]]:
    """Pixels turned by 90°, and the EXIF tag that turns them back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return image.transpose(Image.Transpose.ROTATE_90), {"quality": 95, "exif": exif}


def recompressed(image: Image.Image) -> tuple[Image.Image, dict[str, object]]:
    return image, {"quality": 50}


def halved(image: Image.Image) -> tuple[Image.Image, dict[str, object]]:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS), {"quality": 90}


ALTERATIONS = {"rotated": rotated, "recompressed": recompressed, "halved": halved}


def altered(path: Path, how: str, folder: Path) -> Path:
    with Image.open(path) as image:
        changed, options = ALTERATIONS[how](ImageOps.exif_transpose(image).convert("RGB"))
    data = io.BytesIO()
    changed.save(data, "JPEG", **options)
    out = folder / how / path.name
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(data.getvalue())
    return out


def model_record() -> ModelRecord:
    info = inspect_model(str(trained_vit()))
    return ModelRecord(
        name=info.name, family=info.family, architecture=info.architecture, digest=info.digest, dtype="float32",
        hidden_size=info.hidden_size, num_labels=info.num_labels, pooled=info.pooled, preprocessing=info.preprocessing,
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """The run of all 200 photographs. Its vectors come from the embedding that searches use."""
    files = [str(path) for path in photos()]
    model = model_record()
    blank = RunContent({"cls": np.ones((1, model.hidden_size), np.float32)}, parts=1, model=model)
    embed = Embedder(FeatureStore.open(str(write_run(tmp_path_factory.mktemp("blank"), blank))).record, "cls").images
    content = RunContent({"cls": embed(files)}, uris=files, model=model)
    return FeatureStore.open(str(write_run(tmp_path_factory.mktemp("run"), content)))


@pytest.fixture(scope="module")
def copies(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("copies")
    embed = Embedder(store.record, "cls").images
    return {how: embed([str(altered(path, how, folder)) for path in photos(_COPIES)]) for how in ALTERATIONS}


@pytest.mark.parametrize("how", ALTERATIONS)
def test_copy_finds_its_original_first(store: FeatureStore, copies: dict[str, np.ndarray], how: str) -> None:
    _, positions = top_k(store.load("cls"), Preparation().apply(copies[how]), 1)
    assert (positions[:, 0] == np.arange(_COPIES)).sum() >= 95


def test_planted_recompressions_are_found(store: FeatureStore, copies: dict[str, np.ndarray], tmp_path: Path) -> None:
    vectors = np.concatenate([store.matrix("cls"), copies["recompressed"]])
    planted = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": vectors}))))
    found = find_duplicates(planted)
    pairs = {
        (first, second)
        for group in range(found.groups)
        for first in found.row[found.group == group].tolist()
        for second in found.row[found.group == group].tolist()
        if first < second
    }
    truth = {(row, 200 + row) for row in range(_COPIES)}
    assert len(pairs & truth) / len(truth) >= 0.95
    assert len(pairs & truth) / len(pairs) >= 0.95


def test_search_by_a_picture_on_the_command_line(
    store: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = altered(photos()[7], "halved", tmp_path)
    app = typer.Typer()
    app.command()(search_command)
    app([store.root, "--image", str(copy), "-k", "3", "--json"], standalone_mode=False)
    hits = json.loads(capsys.readouterr().out)
    assert hits[0]["row"] == 7
    assert hits[0]["uri"] == str(photos()[7])


def test_picture_that_cannot_be_read(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_text("not a picture")
    with pytest.raises(SpecError, match=r"--image .*no\.jpg: "):
        Embedder(store.record, "cls").images([str(tmp_path / "no.jpg")])


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = model_record().model_copy(update={"digest": "e" * 64})
    content = RunContent({"cls": np.ones((3, model.hidden_size), np.float32)}, model=model)
    store = FeatureStore.open(str(write_run(tmp_path, content)))
    with pytest.raises(CheckpointError, match="is not the model of this run any more"):
        Embedder(store.record, "cls").images([str(photos()[0])])
