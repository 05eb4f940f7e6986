"""`--dtype int8` through the whole job: its distance from float32 is measured first, recorded, and can stop the run."""

from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import make_checkpoint
from support.commands import table
from support.testdata import needs_testdata, photos, trained_vit

from pipeline.flow import Connect, run
from pipeline.models import describe_hardware
from pipeline.models.precision import INT8_CPU_FLAGS
from schemas.errors import SpecError
from schemas.spec import build_spec

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    needs_testdata,
    pytest.mark.skipif(not describe_hardware(cuda=False).cpu_flags & INT8_CPU_FLAGS, reason="no int8 units here"),
]


def test_the_distance_is_measured_and_recorded(tmp_path: Path, connect: Connect) -> None:
    values = {"sources": list(map(str, photos(24))), "model": str(trained_vit())}
    features = {}
    for dtype in ("int8", "float32"):
        summary = run(build_spec({**values, "out": str(tmp_path / dtype), "dtype": dtype}), connect)
        assert summary.images == 24
        features[dtype] = np.array(table(tmp_path / dtype)["cls"].to_pylist())
        if dtype == "int8":
            distance = summary.attempt.distance
            assert distance is not None
            assert distance.images == 16
            assert 0.995 < distance.least <= distance.median < 0.99999
        else:
            assert summary.attempt.distance is None
    a, b = features["int8"], features["float32"]
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert 0.995 < cosines.min() < 0.99999


def test_files_in_front_that_are_no_pictures_leave_nothing_unmeasured(
    tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS's `._photo.jpg` stand before all pictures. Who resumes keeps what was found."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(20):
        (folder / f"._{number:02d}.jpg").write_bytes(b"\x00\x05\x16\x07")
    for photo in photos(18):
        (folder / photo.name).symlink_to(photo)
    spec = build_spec(
        {"sources": [str(folder)], "model": str(trained_vit()), "out": str(tmp_path / "o"), "dtype": "int8"}
    )
    summary = run(spec, connect)
    assert (summary.images, summary.failures) == (18, 20)
    distance = summary.attempt.distance
    assert distance is not None
    assert distance.images == 16

    monkeypatch.setattr("pipeline.flow.measure_distance", None)
    for part in (tmp_path / "o" / "images").iterdir():
        part.unlink()
    again = run(spec, connect).attempt
    assert again.rows_planned == 18
    assert again.distance == distance


def test_a_precision_that_no_image_could_be_measured_in_is_told(
    tmp_path: Path, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(20):
        (tmp_path / f"{number}.jpg").write_bytes(b"no picture")
    spec = build_spec(
        {"sources": [str(tmp_path)], "model": str(trained_vit()), "out": str(tmp_path / "o"), "dtype": "int8"}
    )
    attempt = run(spec, connect).attempt
    assert attempt.failures == 20
    assert attempt.distance is not None
    assert (attempt.distance.images, attempt.distance.median) == (0, None)
    assert "--dtype int8: how far it is from float32 is not known, for none of the 20 images" in caplog.text


def test_a_model_that_cannot_bear_it_stops_the_run(tmp_path: Path, connect: Connect) -> None:
    """In float32 the same function as before; in eight bits one channel leaves room for no other."""
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(tmp_path / "model", "vit")
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "layernorm_before" in name or "layernorm_after" in name:
            tensor[0] *= 3000
        elif name.endswith(("query.weight", "key.weight", "value.weight", "intermediate.dense.weight")):
            tensor[:, 0] /= 3000
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    spec = build_spec(
        {"sources": list(map(str, photos(4))), "model": str(folder), "out": str(tmp_path / "o"), "dtype": "int8"}
    )
    with pytest.raises(SpecError, match=r"median cosine of .* less than 0.99; use --dtype auto"):
        run(spec, connect)
    assert not list((tmp_path / "o" / "images").glob("*"))
