"""One of several jobs freezes the inputs, also when an earlier one died over it, and leaves nothing when it fails."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.runs import RunContent, run_record

from pipeline import lock
from pipeline.record import freezing, read_record, require_record
from pipeline.report.run import open_run
from pipeline.retrieval.store import FeatureStore
from schemas.errors import OutputError, SourceError

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
