"""One of several jobs freezes the inputs, also when an earlier one died over it, and leaves nothing when it fails."""

import threading
import time
from pathlib import Path

import pytest

from pipeline import record
from pipeline.record import freezing
from schemas.errors import SourceError


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_BEAT_S", 0.2)


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
