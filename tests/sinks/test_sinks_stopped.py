"""Why a job ends, a signal or an error, hides no write, and no write hides it: what writes made visible counts."""

import gc
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from cluster.session import ray_session
from pipeline.sinks import ray_writer
from pipeline.sinks.ray_writer import Committed, Received, commit_stream
from schemas.attempt import StageSeconds
from schemas.errors import OutputError
from schemas.spec import SinkSpec


@pytest.mark.slow
@pytest.mark.parametrize("told", [KeyboardInterrupt, GeneratorExit])
def test_a_last_write_that_fails_hides_neither_the_signal_nor_the_other_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, told: type[BaseException]
) -> None:
    go = tmp_path / "go"

    def first_fails(job: Any, *blocks: pa.Table) -> Committed:
        while not go.exists():
            time.sleep(0.02)
        if blocks[0]["row"][0].as_py() == 0:
            raise OutputError("cannot write /out: the disk is full")
        return Committed(2, 0, 1, StageSeconds(), {})

    def bundles() -> Generator[Any, None, None]:
        for row in (0, 8):
            table = pa.table({"row": [row, row + 1]})
            yield from ray.data.from_arrow(table).iter_internal_ref_bundles()

    monkeypatch.setattr(ray_writer, "write_blocks", first_fails)
    job: Any = None
    late: list[Committed] = []
    with ray_session(cpus=1):
        events = commit_stream(bundles(), job, SinkSpec(part_bytes=1, commit_s=60), late.append)
        received = 0
        while received < 4:
            event = next(events)
            received += event.rows if isinstance(event, Received) else 0
        go.touch()
        with pytest.raises(told):
            events.throw(told())
    assert [committed.images for committed in late] == [2]
    assert "its rows stay pending: cannot write /out: the disk is full" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("later_s", [0, 1])
def test_a_write_that_fails_hides_no_other_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, later_s: int
) -> None:
    """Whether they had ended when it failed or ended behind it."""

    go = tmp_path / "go"

    def third_succeeds(job: Any, *blocks: pa.Table) -> Committed:
        if blocks[0]["row"][0].as_py() < 16:
            while not go.exists():
                time.sleep(0.02)
            raise OutputError("cannot write /out: the disk is full")
        time.sleep(later_s)
        return Committed(2, 0, 1, StageSeconds(), {})

    def bundles() -> Generator[Any, None, None]:
        for row in (0, 8, 16):
            table = pa.table({"row": [row, row + 1]})
            yield from ray.data.from_arrow(table).iter_internal_ref_bundles()

    monkeypatch.setattr(ray_writer, "write_blocks", third_succeeds)
    job: Any = None
    told: list[Committed] = []

    def listen() -> None:
        received = 0
        for event in events:
            received += event.rows if isinstance(event, Received) else 0
            told.extend([event] if isinstance(event, Committed) else [])
            if received == 6:
                go.touch()

    with ray_session(cpus=1):
        events = commit_stream(bundles(), job, SinkSpec(part_bytes=1, commit_s=60), told.append)
        with pytest.raises(OutputError, match="the disk is full"):
            listen()
    assert [committed.images for committed in told] == [2]
    assert not caplog.text, "once is enough"


@pytest.mark.slow
def test_what_was_received_before_the_stream_failed_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def bundles() -> Generator[Any, None, None]:
        yield from ray.data.from_arrow(pa.table({"row": [0, 1]})).iter_internal_ref_bundles()
        raise RuntimeError("the stream failed")

    monkeypatch.setattr(ray_writer, "write_blocks", lambda job, *blocks: Committed(2, 0, 1, StageSeconds(), {}))
    job: Any = None
    late: list[Committed] = []
    with ray_session(cpus=1), pytest.raises(RuntimeError, match="the stream failed"):
        list(commit_stream(bundles(), job, SinkSpec(), late.append))
    assert [committed.images for committed in late] == [2]


class Actor:
    """In the place of an actor's handle, which Ray Data's frames hold."""


def failed_below() -> None:
    handle = Actor()
    try:
        raise ValueError(f"of {handle!r}")
    except ValueError as error:
        raise RuntimeError("the stream failed") from error


@pytest.mark.slow
def test_an_error_of_the_stream_keeps_no_actor_alive() -> None:
    """The next job of the process would wait for the CPUs that it has booked."""

    def bundles() -> Generator[Any, None, None]:
        yield from ()
        failed_below()

    job: Any = None
    with ray_session(cpus=1), pytest.raises(RuntimeError) as told:
        list(commit_stream(bundles(), job, SinkSpec(), print))
    assert "of <" in str(told.value.__cause__)
    assert not [thing for thing in gc.get_objects() if isinstance(thing, Actor)]
