"""Pictures to vectors by the model of a run: by address and as bytes alike, or why not."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.checkpoints import make_checkpoint
from support.runs import RunContent, run_record

from pipeline.embedding import Embedder, model_of
from pipeline.models import inspect_model, load_model
from pipeline.opening import open_directory, resolve_job
from pipeline.record import require_record
from schemas.errors import ImageError, SpecError
from schemas.run import ModelRecord, RunRecord
from schemas.spec import build_spec


def record_of(checkpoint: Path) -> RunRecord:
    info = inspect_model(str(checkpoint))
    model = ModelRecord(
        name=str(checkpoint), family=info.family, architecture=info.architecture, digest=info.digest, dtype="float32",
        hidden_size=info.hidden_size, num_labels=0, pooled=info.pooled, preprocessing=info.preprocessing,
    )  # fmt: skip
    return run_record(RunContent({"cls": np.ones((1, info.hidden_size), np.float32)}, model=model))


def test_a_picture_has_one_vector_however_it_is_given(tmp_path: Path) -> None:
    record = record_of(make_checkpoint(tmp_path / "vit", "vit"))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 40, 3), np.uint8)  # more than are held at once
    files = [tmp_path / f"{number}.png" for number in range(len(pixels))]
    for file, picture in zip(files, pixels, strict=True):
        Image.fromarray(picture).save(file)
    embedder = Embedder(record, "cls")
    vectors = embedder.images([str(file) for file in files])
    assert vectors.shape == (40, record.model.hidden_size)
    np.testing.assert_allclose(vectors[33], embedder.image(files[33].read_bytes()), atol=1e-5)
    assert not np.allclose(vectors[33], vectors[32], atol=1e-3)
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(SpecError, match=r"--image .*no\.png: "):
        embedder.images([str(files[0]), str(tmp_path / "no.png")])
    for data in (b"no picture", b""):
        with pytest.raises(ImageError):
            embedder.image(data)


def test_a_run_without_a_model_embeds_nothing() -> None:
    record = run_record(RunContent({"cls": np.ones((1, 4), np.float32)}))
    record = record.model_copy(update={"model": record.model.model_copy(update={"family": "null"})})
    with pytest.raises(SpecError, match="without a model"):
        Embedder(record, "cls").image(b"")


@pytest.mark.parametrize("model", ["vit", "./models/vit", "models/vit", "models/vit/model.safetensors"])
def test_the_model_of_a_run_is_found_from_another_folder(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`models/vit` might as well be a name on the hub."""
    make_checkpoint(tmp_path / "models" / "vit", "vit")
    monkeypatch.chdir(tmp_path / "models" if model == "vit" else tmp_path)
    Image.new("RGB", (40, 40)).save(tmp_path / "1.png")
    out = str(tmp_path / "out")
    spec = build_spec({"sources": [str(tmp_path / "1.png")], "model": model, "out": out})
    begun = open_directory(resolve_job(spec)).record
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    info = model_of(require_record(out, {}), None, {})
    assert load_model(info)
    again = spec.model_copy(update={"model": info.name})
    assert open_directory(resolve_job(again)).record == begun
    earlier = begun.model_copy(update={"model": begun.model.model_copy(update={"name": model})})
    (tmp_path / "out" / "run.json").write_text(earlier.model_dump_json())
    assert open_directory(resolve_job(again)).record == earlier, "another spelling of the same weights"
