"""The main job in one process with a real Ray: what stands in the output is what the stages give by themselves."""

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from support.checkpoints import make_checkpoint
from support.commands import rows_in, table
from support.testdata import TESTDATA, needs_testdata, photos, trained_vit

from pipeline import flow, maintenance
from pipeline.flow import Connect, run
from pipeline.predictors.null import null_features
from pipeline.progress import Progress
from schemas.errors import CheckpointError, ClusterError, OutputError
from schemas.release import release
from schemas.spec import JobSpec, build_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def spec_for(out: Path, **values: object) -> JobSpec:
    return build_spec({"out": str(out), "dtype": "float32", "sink": {"commit_s": 1.0}, **values})


def test_through_ray_or_called_directly_is_the_same(
    tmp_path: Path, connect: Connect, pictures: Path, checkpoint: Path
) -> None:
    from pipeline.images.stage import Reading, fetch_and_decode
    from pipeline.models import inspect_model
    from pipeline.predictors.batches import Wanted
    from pipeline.predictors.torch_predictor import TorchPredictor
    from pipeline.sources.manifest import ManifestPart, read_rows

    spec = spec_for(tmp_path / "o", sources=[str(pictures)], model=str(checkpoint), labels=3)
    summary = run(spec, connect)
    assert summary.images + summary.failures == summary.rows == len([p for p in pictures.rglob("*") if p.is_file()])
    assert summary.failures > 0

    info = inspect_model(str(checkpoint))
    wanted = Wanted(("cls", "pooled"), (info.hidden_size, info.pooled_size), "float32", 3, info.labels, False)
    (manifest_file,) = (tmp_path / "o" / "manifest").glob("*.parquet")
    part = ManifestPart(manifest_file.name, 0, summary.rows)
    manifest = pa.concat_tables(read_rows(spec.out, [part], np.array([[0, summary.rows]]), {}))
    decoded = fetch_and_decode(manifest, Reading(info.preprocessing), batch_rows=16)
    predict = TorchPredictor(info, wanted, dtype="float32", batch_size=16)
    direct = pa.concat_tables(predict(batch) for batch in decoded).sort_by("row")
    good = direct.filter(pa.compute.is_null(direct["error"]))
    written = table(tmp_path / "o")
    for name in ("row", "uri", "sha256", "width", "height", "format"):
        assert good[name].to_pylist() == written[name].to_pylist()
    for name in ("cls", "pooled"):
        ours, theirs = np.array(written[name].to_pylist()), np.array(good[name].to_pylist())
        assert np.abs(ours - theirs).max() <= 1e-4 * max(1.0, float(np.abs(theirs).max()))
    best = [[label["index"] for label in labels] for labels in written["labels"].to_pylist()]
    assert best == [[label["index"] for label in labels] for labels in good["labels"].to_pylist()]


def test_features_in_float16(tmp_path: Path, connect: Connect, pictures: Path) -> None:
    """A final norm that gives more than 65,504: in float32 an image like others."""
    folder = make_checkpoint(tmp_path / "model", "vit")
    weights = load_file(folder / "model.safetensors")
    values = {"sources": [str(pictures)], "model": str(folder), "limit": 4, "feature_dtype": "float16"}
    assert run(spec_for(tmp_path / "small", **values), connect).images == 4
    written = table(tmp_path / "small")
    assert str(written["cls"].type.value_type) == str(written["pooled"].type.value_type) == "halffloat"
    assert np.isfinite(np.array(written["cls"].to_pylist())).all()
    weights["layernorm.bias"][0] = 70_000
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    summary = run(spec_for(tmp_path / "large", **values), connect)
    assert (summary.images, summary.failures) == (0, 4)
    assert set(table(tmp_path / "large", "failures")["error"].to_pylist()) == {"NotFinite"}


def test_a_run_is_not_repeated_and_not_mixed(
    tmp_path: Path, connect: Connect, pictures: Path, checkpoint: Path
) -> None:
    values = {"sources": [str(pictures)], "model": str(checkpoint), "limit": 8, "features": ["cls"]}
    first = run(spec_for(tmp_path / "o", **values), connect)
    assert first.rows == 8

    def never() -> None:
        raise AssertionError("Ray was started although nothing is pending")

    again = run(spec_for(tmp_path / "o", **values), never)  # type: ignore[arg-type]
    assert again.attempt.rows_planned == 0
    with pytest.raises(OutputError) as refused:
        run(spec_for(tmp_path / "o", **{**values, "features": ["pooled"], "limit": 9}), connect)
    message = str(refused.value)
    assert 'spec.features: there ["cls"] → now ["pooled"]' in message
    assert "spec.limit: there 8 → now 9" in message
    (part,) = (tmp_path / "o" / "images").glob("*.parquet")
    metadata = json.loads(pq.read_schema(part).metadata[b"patchstream"])
    assert metadata["model"]["name"] == str(checkpoint)
    assert len(metadata["model"]["digest"]) == 64
    assert metadata["model"]["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert metadata["versions"]["torch"]


def test_many_rows_without_a_model(tmp_path: Path, connect: Connect) -> None:
    count = 30_000
    listed = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"uri": [f"s3://nowhere/{i}.jpg" for i in range(count)], "n": range(count)}), listed)
    spec = spec_for(tmp_path / "o", sources=[str(listed)], model="null", backend="null")
    summary = run(spec, connect)
    assert (summary.images, summary.failures) == (count, 0)
    written = table(tmp_path / "o")
    rows = written["row"].to_numpy()
    assert rows.tolist() == list(range(count))
    assert written["n"].to_pylist() == rows.tolist()
    width = written["cls"].type.list_size
    flat = written["cls"].combine_chunks().flatten().to_numpy().reshape(-1, width)
    np.testing.assert_allclose(flat, null_features(rows, width), atol=1e-6)
    assert maintenance.verify(spec.out, {}).problems == []


@pytest.mark.parametrize(("may_grow", "shards", "tasks"), [(False, 1, 2), (True, 1, 3), (True, 2, None)])
def test_the_cores_of_a_rate_are_those_that_there_were(
    tmp_path: Path, connect: Connect, may_grow: bool, shards: int, tasks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster may have more of them later than in the beginning, and other shards that compute there."""
    monkeypatch.setattr("pipeline.flow._resources_now", lambda: (3.0, 0.0))
    (tmp_path / "list.csv").write_text("uri\n" + "".join(f"http://nowhere/{i}.jpg\n" for i in range(20)))
    values = {"sources": [str(tmp_path / "list.csv")], "model": "null", "backend": "null"}
    spec = spec_for(tmp_path / "o", shard={"index": 0, "count": shards}, **values)
    with connect() as machines:
        cluster = machines._replace(may_grow=may_grow)
        assert run(spec, lambda: nullcontext(cluster)).attempt.decode_tasks == tasks


def test_shards_fill_one_directory(tmp_path: Path, connect: Connect, pictures: Path) -> None:
    values = {"sources": [str(pictures)], "model": "null", "backend": "null", "limit": 30}
    for index in (2, 0, 1):
        shard = {"index": index, "count": 3}
        assert run(spec_for(tmp_path / "o", shard=shard, **values), connect).rows == 10
    rows = rows_in(tmp_path / "o") + rows_in(tmp_path / "o", "failures")
    assert sorted(rows) == list(range(30))
    assert maintenance.verify(str(tmp_path / "o"), {}).problems == []


def test_mended_files_are_tried_again(tmp_path: Path, connect: Connect, pictures: Path, checkpoint: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good = next(path for path in sorted(pictures.rglob("*.jpg")) if path.stat().st_size > 2000)
    (folder / "a.jpg").write_bytes(good.read_bytes())
    (folder / "b.jpg").write_bytes(good.read_bytes()[:500])
    (folder / "c.txt").write_text("no picture")
    spec = spec_for(tmp_path / "o", sources=[str(folder)], model=str(checkpoint))
    assert run(spec, connect).failures == 2
    with pytest.raises(OutputError, match="none of its 2 failures is worth another try"):
        maintenance.reopen_failures(spec.out, False, {})
    (folder / "b.jpg").write_bytes(good.read_bytes())
    count, values = maintenance.reopen_failures(spec.out, True, {})
    assert count == 2
    assert maintenance.status(spec.out, {})["pending"] == 2
    summary = run(build_spec(values), connect)
    assert (summary.images, summary.failures, summary.attempt.rows_planned) == (2, 1, 2)

    (folder / "d.jpg").write_bytes(good.read_bytes())
    looks: list[Progress] = []
    run(build_spec({**values, "update": True}), connect, looks.append)
    # What failed before is among the rows that are done.
    assert {look.failures for look in looks if look.phase == "running"} == {1}


@needs_testdata
def test_trained_vit_labels_real_photographs(tmp_path: Path, connect: Connect) -> None:
    spec = spec_for(tmp_path / "o", sources=[str(TESTDATA / "photos")], model=str(trained_vit()), labels=5)
    summary = run(spec, connect)
    assert (summary.images, summary.failures) == (len(photos()), 0)
    synsets = (TESTDATA / "labels" / "timm_imagenet_synsets.txt").read_text().split()
    written = table(tmp_path / "o")
    hits = [
        synsets[labels[0]["index"]] == Path(uri).name.split("_")[0]
        for uri, labels in zip(written["uri"].to_pylist(), written["labels"].to_pylist(), strict=True)
    ]
    assert np.mean(hits) >= 0.83


@needs_testdata
def test_every_odd_file_ends_in_one_place(tmp_path: Path, connect: Connect) -> None:
    folder = TESTDATA / "odd-images"
    files = sorted(str(path.resolve()) for path in folder.rglob("*") if path.is_file())
    spec = spec_for(tmp_path / "o", sources=[str(folder)], model=str(trained_vit()), features=["cls"])
    summary = run(spec, connect)
    assert summary.images + summary.failures == summary.rows == len(files)
    uris = table(tmp_path / "o")["uri"].to_pylist() + table(tmp_path / "o", "failures")["uri"].to_pylist()
    assert Counter(str(Path(uri).resolve()) for uri in uris) == Counter(files)
    assert maintenance.verify(spec.out, {}).problems == []


def test_the_names_of_classes_belong_to_the_run(
    tmp_path: Path, connect: Connect, pictures: Path, checkpoint: Path
) -> None:
    """Another file with the same content is the same run; other names are another."""
    for name, word in (("a.txt", "class"), ("same.txt", "class"), ("other.txt", "kind")):
        (tmp_path / name).write_text("\n".join(f"{word} {i}" for i in range(37)))
    values = {"sources": [str(pictures)], "model": str(checkpoint), "limit": 6, "features": [], "labels": 2}
    run(spec_for(tmp_path / "o", **values, label_file=str(tmp_path / "a.txt")), connect)
    for labels in table(tmp_path / "o")["labels"].to_pylist():
        assert [label["label"] for label in labels] == [f"class {label['index']}" for label in labels]
    again = run(spec_for(tmp_path / "o", **values, label_file=str(tmp_path / "same.txt")), connect)
    assert again.attempt.rows_planned == 0
    for extra in ({"label_file": str(tmp_path / "other.txt")}, {}):
        with pytest.raises(OutputError, match=r"model\.label_digest: there"):
            run(spec_for(tmp_path / "o", **values, **extra), connect)
    assert maintenance.verify(str(tmp_path / "o"), {}).problems == []


def test_what_a_worker_refuses_is_said_in_our_own_words(
    tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray passes its traceback off as the message, and adds advice of its own."""
    monkeypatch.setattr("pipeline.flow.release", lambda: release()._replace(version="0.0.1", home="/elsewhere"))
    (tmp_path / "a.jpg").write_bytes(b"x")
    spec = build_spec({"sources": [str(tmp_path)], "model": "null", "backend": "null", "out": str(tmp_path / "out")})
    with pytest.raises(ClusterError) as error:
        run(spec, connect)
    assert str(error.value).startswith("a worker on ")
    assert len(str(error.value).splitlines()) == 1


def test_a_model_that_changed_since_the_run_was_planned_ends_it(
    tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an actor finds wrong as it is made reaches the user as it was said."""
    model = tmp_path / "model"
    make_checkpoint(model, "vit-classifier")
    real = flow.build

    def change_and_build(*args: Any) -> Any:
        weights = load_file(model / "model.safetensors")
        save_file({name: 2 * tensor for name, tensor in weights.items()}, model / "model.safetensors")
        return real(*args)

    monkeypatch.setattr(flow, "build", change_and_build)
    Image.new("RGB", (64, 64), (9, 99, 199)).save(tmp_path / "a.png")
    spec = spec_for(tmp_path / "o", sources=[str(tmp_path / "a.png")], model=str(model), features=["cls"])
    with pytest.raises(CheckpointError, match="but the run was planned with") as error:
        run(spec, connect)
    assert len(str(error.value).splitlines()) == 1
