"""What a job holds while its writes are slow: so many of them and no more, and at its end not for ever."""

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from cluster.session import ray_session
from pipeline.placement import MOST_WRITES
from pipeline.sinks import ray_writer
from pipeline.sinks.ray_writer import Committed, Received, commit_stream
from schemas.attempt import StageSeconds
from schemas.spec import SinkSpec

BLOCKS = 16
EACH = SinkSpec(part_bytes=1, commit_s=60)

pytestmark = pytest.mark.slow


class Writes:
    """Writes that end once `go` is there, which a wait without a limit sees to, and the waits for them. `taken`: blocks
    that had left the stream when it began, with time for more."""

    def __init__(self, go: Path) -> None:
        self.go = go
        self.left: list[int] = []
        self.taken: int | None = None
        self.in_flight: list[int] = []
        self.timeouts: list[float | None] = []
        self._wait = ray.wait

    def wait(self, references: list[Any], *, num_returns: int, timeout: float | None) -> Any:
        self.in_flight.append(len(references))
        self.timeouts.append(timeout)
        if timeout is None and not self.go.exists():
            until = time.monotonic() + 2.0
            while len(self.left) < BLOCKS and time.monotonic() < until:
                time.sleep(0.02)
            self.taken = len(self.left)
            self.go.touch()
        return self._wait(references, num_returns=num_returns, timeout=timeout)


@pytest.fixture
def writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Writes:
    go = tmp_path / "go"

    def write(job: Any, *blocks: pa.Table) -> Committed:
        while not go.exists():
            time.sleep(0.02)
        return Committed(len(blocks[0]), 0, 1, StageSeconds(), {})

    found = Writes(go)
    monkeypatch.setattr(ray_writer, "write_blocks", write)
    monkeypatch.setattr(ray, "wait", found.wait)
    return found


def bundles(left: list[int]) -> Generator[Any, None, None]:
    for row in range(BLOCKS):
        left.append(row)
        yield from ray.data.from_arrow(pa.table({"row": [row]})).iter_internal_ref_bundles()


def test_a_stream_that_is_faster_than_its_writes_waits_for_them(writes: Writes) -> None:
    job: Any = None
    with ray_session(cpus=1):
        events = list(commit_stream(bundles(writes.left), job, EACH, print))
    assert sum(event.images for event in events if isinstance(event, Committed)) == BLOCKS
    assert max(writes.in_flight) == MOST_WRITES < BLOCKS
    # Beside those that are written two wait, and one is on its way to them.
    assert writes.taken is not None
    assert writes.taken <= MOST_WRITES + 3 < BLOCKS


def test_a_write_that_does_not_end_keeps_no_job_that_was_told_to(
    writes: Writes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_writer, "_DRAIN_S", 0.25)
    job: Any = None
    late: list[Committed] = []
    with ray_session(cpus=1):
        events = commit_stream(bundles(writes.left), job, EACH, late.append)
        while not isinstance(next(events), Received):
            pass
        with pytest.raises(KeyboardInterrupt):
            events.throw(KeyboardInterrupt())
        writes.go.touch()
    assert writes.timeouts[-1] == 0.25
    assert late == []
