"""One of several jobs freezes the inputs, also when an earlier one died over it, and leaves nothing when it fails."""

import json
import re
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.runs import RunContent, run_record

from pipeline import lock
from pipeline.maintenance import reopen_failures
from pipeline.opening import open_directory, resolve_job
from pipeline.record import check_same, freezing, read_record, require_record, write_record
from pipeline.report.run import open_run
from pipeline.retrieval.store import FeatureStore
from schemas.errors import OutputError, SourceError
from schemas.preprocessing import Preprocessing
from schemas.run import ModelRecord, RunRecord
from schemas.spec import RECORDED_FIELDS, JobSpec, build_spec

NOBODY = {"endpoint_url": "http://127.0.0.1:1", "key": "hidden", "secret": "hidden"}


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_BEAT_S", 0.2)


def test_a_failed_start_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError), freezing(str(tmp_path / "out"), {}):
        raise SourceError("nothing matches")
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SourceError), freezing(str(tmp_path), {}):
        raise SourceError("nothing matches")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("stamp", ["2001-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00", ""])
def test_a_dead_holder_is_followed_whatever_its_clock_said(tmp_path: Path, stamp: str) -> None:
    (tmp_path / "_freezing").write_text(stamp)
    with freezing(str(tmp_path), {}) as mine:
        assert mine


def test_a_holder_that_beats_is_waited_for(tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with freezing(str(tmp_path), {}):
            inside.set()
            leave.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert inside.wait(30)
    order = []

    def follow() -> None:
        with freezing(str(tmp_path), {}):
            order.append("second")

    second = threading.Thread(target=follow)
    second.start()
    time.sleep(2.0)  # ten beats
    order.append("first")
    leave.set()
    holder.join()
    second.join()
    assert order == ["first", "second"]


# All that two runs on one directory must agree on, and another value of it.
DECIDES: dict[str, object] = {
    "spec.sources": ["other/"],
    "spec.features": ["pooled"],
    "spec.labels": 5,
    "spec.feature_dtype": "float16",
    "spec.decode": "fast",
    "spec.image_size": 384,
    "spec.beit_final_norm": True,
    "spec.zero_shot": ["a cat", "a dog"],
    "spec.templates": ["a drawing of a {}."],
    "spec.limit": 10,
    "spec.include": ["*.jpg"],
    "spec.exclude": ["*.png"],
    "spec.uri_column": "address",
    "spec.image_column": "picture",
    "model.digest": "1" * 64,
    "model.dtype": "int8",
    "model.pooled": "pooler",
    "model.preprocessing": Preprocessing(resize=(384, 384)).model_dump(mode="json"),
    "model.label_digest": "2" * 64,
    "model.zero_shot": "3" * 64,
    "model.head": "4" * 64,
}
# Where things are, how the work was done, and what follows from the above.
LEAVES_OPEN: dict[str, object] = {
    "spec.revision": "main",
    "spec.vocabulary": "elsewhere/vocab.json",
    "spec.label_file": "elsewhere/labels.txt",
    "spec.head": "elsewhere/head",
    "spec.fetch": {"concurrency": 1},
    "spec.sink": {"commit_s": 1.0},
    "spec.backend": "triton",
    "spec.triton": {"url": "grpc://host:8001"},
    "spec.batch_size": 4,
    "spec.gpus_per_actor": 1.0,
    "spec.max_failure_rate": 0.5,
    "model.name": "elsewhere/vit",
    "model.revision": "main",
    "model.family": "deit",
    "model.architecture": "other",
    "model.hidden_size": 8,
    "model.num_labels": 3,
    "model.multi_label": True,
    "run_id": "another",
    "created": "2027-01-01T00:00:00+00:00",
    "versions": {"torch": "9.0"},
    "feature_dims": {"cls": 8},
    "manifest_rows": 9,
    "manifest_parts": ["another"],
    "base_parts": 2,
    "applied": {"probe": "p", "digest": "d", "feature": "cls", "trained_on": "t", "run_id": "r"},
}


def a_record() -> RunRecord:
    spec = JobSpec(sources=("photos/",), model="vit", out="out").model_dump(mode="json", include=set(RECORDED_FIELDS))
    record = run_record(RunContent({"cls": np.ones((1, 4), np.float32)}))
    return record.model_copy(update={"spec": spec})


def changed(record: RunRecord, field: str, value: object) -> RunRecord:
    content = record.model_dump(mode="json")
    *folder, name = field.split(".")
    place = content[folder[0]] if folder else content
    assert place[name] != value
    place[name] = value
    return RunRecord.model_validate(content)


@pytest.mark.parametrize("field", DECIDES)
def test_a_directory_takes_no_other_computation(field: str) -> None:
    other = changed(a_record(), field, DECIDES[field])
    for pair in ((a_record(), other), (other, a_record())):
        with pytest.raises(OutputError, match=r"out holds another run") as error:
            check_same(*pair, "out")
        _, *lines, _ = str(error.value).splitlines()
        assert lines
        assert all(re.match(rf"  {re.escape(field)}[.:]", line) for line in lines)


@pytest.mark.parametrize("field", LEAVES_OPEN)
def test_a_directory_takes_the_same_computation_done_elsewhere_or_otherwise(field: str) -> None:
    check_same(a_record(), changed(a_record(), field, LEAVES_OPEN[field]), "out")


def test_every_field_of_a_record_is_one_or_the_other() -> None:
    fields = {*RunRecord.model_fields} - {"spec", "model", "schema_version"}
    fields |= {f"spec.{name}" for name in RECORDED_FIELDS} | {f"model.{name}" for name in ModelRecord.model_fields}
    assert sorted(fields) == sorted([*DECIDES, *LEAVES_OPEN])


def test_parts_of_an_earlier_version_are_still_this_runs(tmp_path: Path) -> None:
    """A field that came later has its default in them; another model has not."""
    content = RunContent({"cls": np.ones((1, 4), np.float32)})
    run = run_record(content)
    earlier = json.loads(run.part_metadata())
    del earlier["model"]["zero_shot"], earlier["model"]["preprocessing"]["crop_rounding"]
    assert run.describes(json.dumps(earlier).encode())
    earlier["model"]["digest"] = "another"
    assert not run.describes(json.dumps(earlier).encode())
    assert not run.describes(b"{}")
    assert not run.describes(None)


@pytest.mark.parametrize(
    ("options", "cause"),
    [({"endpoint_url": "http://127.0.0.1:1"}, "NoCredentialsError"), (NOBODY, "EndpointConnectionError")],
)
def test_a_store_that_cannot_be_asked_is_told_in_words(options: dict[str, object], cause: str) -> None:
    with pytest.raises(OutputError, match=rf"cannot read s3://nowhere/out/run\.json: {cause}: .*credentials") as error:
        read_record("s3://nowhere/out", options)
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize("read", [read_record, FeatureStore.open, open_run])
@pytest.mark.parametrize("content", [b"\xff\xfe\x00run", b"{", b"[]", b'{"schema_version": 1}'])
def test_a_file_that_is_no_record(tmp_path: Path, read: Callable[..., object], content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(OutputError, match=r"run\.json is not a run record of this version") as error:
        read(str(tmp_path), {})
    assert "give the directory of a run, or another --out" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", [require_record, FeatureStore.open, open_run])
def test_a_place_that_is_no_run(tmp_path: Path, read: Callable[..., object]) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(
        OutputError, match=r"not the directory of a run: it has no run\.json \(it holds: holiday\.jpg\)"
    ):
        read(str(tmp_path), {})
    with pytest.raises(OutputError, match="nowhere: no such directory"):
        read(str(tmp_path / "nowhere"), {})
    with pytest.raises(OutputError, match=r"cannot read s3://nowhere/out/run\.json: EndpointConnectionError"):
        read("s3://nowhere/out", NOBODY)


def opened(source: str, out: Path, **values: object) -> RunRecord:
    """The record of a run of no model over `source`, begun or gone on with."""
    spec = {"sources": [source], "out": str(out), "model": "null", "backend": "null", **values}
    return open_directory(resolve_job(build_spec(spec))).record


@pytest.fixture
def years(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "2023", tmp_path / "2024"]
    for folder in folders:
        (folder / "photos").mkdir(parents=True)
        (folder / "photos" / f"{folder.name}.jpg").write_bytes(b"")
    return folders


@pytest.mark.parametrize("source", [".", "photos", "*/*.jpg", "file://photos", "simplecache::file://photos"])
@pytest.mark.parametrize("update", [False, True])
def test_the_same_words_in_another_folder_are_another_source(
    source: str, update: bool, years: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(years[0])
    begun = opened(source, tmp_path / "out")
    monkeypatch.chdir(years[1])
    with pytest.raises(OutputError, match=r"spec\.sources: there .*/2023.* → now .*/2024"):
        opened(source, tmp_path / "out", update=update)
    (recorded,) = begun.spec["sources"]
    assert opened(recorded, tmp_path / "out", update=update) == begun


def test_a_folder_is_one_source_however_it_is_spelt(
    years: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(years[0])
    begun = opened("photos", tmp_path / "out")
    for source in ("photos/", "./photos", str(years[0] / "photos"), "../2023/photos"):
        assert opened(source, tmp_path / "out") == begun


@pytest.mark.parametrize("typed", ["photos", "photos/", "{}/photos/"])
def test_a_run_whose_source_was_recorded_as_typed_goes_on(
    typed: str, years: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(years[0])
    out = tmp_path / "out"
    begun = opened("photos", out)
    recorded = changed(begun, "spec.sources", [typed.format(years[0])])
    write_record(str(out), recorded, {})
    assert opened("photos", out) == recorded
    with pytest.raises(OutputError, match=r"spec\.sources"):
        opened("../2024/photos", out)
    monkeypatch.chdir(tmp_path)
    assert reopen_failures(str(out), False, {})[0] == 0, "retry has run.json alone to go by"


@pytest.mark.parametrize("typed", ["list.csv", ".", "zip://*.csv::list.zip", "simplecache::list.csv"])
def test_what_a_ray_job_brings_along_is_one_source_from_job_to_job(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--working-dir` is unpacked into a folder that is named by its content."""
    records = []
    for package in ("_ray_pkg_a1", "_ray_pkg_b2"):
        folder = tmp_path / "runtime_resources" / "working_dir_files" / package
        folder.mkdir(parents=True)
        (folder / "list.csv").write_text("uri\ns3://bucket/1.jpg\n")
        with zipfile.ZipFile(folder / "list.zip", "w") as packed:
            packed.write(folder / "list.csv", "list.csv")
        monkeypatch.chdir(folder)
        records.append(opened(typed, tmp_path / "out"))
    assert records[0] == records[1]
    assert records[0].spec["sources"] == [typed]
