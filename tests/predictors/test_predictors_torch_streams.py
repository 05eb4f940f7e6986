"""The order in which a GPU's streams touch the buffers, checked without one.

Every two accesses of which one writes must be ordered by streams, events and waits, within a call and between calls;
vector clocks tell (Fidge 1988, Mattern 1989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.predictors.torch_runner import Runner, Underway

Clock = dict[str, int]
BATCH, SHAPE = 4, (2, 2, 3)


class Race(AssertionError):
    pass


class Machine:
    """What has happened, and what is known to have happened before what."""

    def __init__(self) -> None:
        self.clocks: dict[str, Clock] = {}
        self.host = "caller 1"
        self.stream = "computing"
        self.accesses: dict[int, list[tuple[str, int, bool]]] = {}
        self.bases: list[np.ndarray] = []  # kept, so that no identity comes twice

    def clock(self, line: str) -> Clock:
        return self.clocks.setdefault(line, {})

    def learn(self, line: str, other: Clock) -> None:
        clock = self.clock(line)
        clock.update({name: max(clock.get(name, 0), count) for name, count in other.items()})

    def work(self, line: str, reads: list[Buffer], writes: list[Buffer]) -> None:
        """One step on `line`; the host that asks for it has come so far."""
        self.learn(line, self.clock(self.host))
        clock = self.clock(line)
        clock[line] = clock.get(line, 0) + 1
        for buffer, writing in [(b, False) for b in reads] + [(b, True) for b in writes]:
            before = self.accesses.setdefault(buffer.base, [])
            for other, count, wrote in before:
                if (writing or wrote) and clock.get(other, 0) < count:
                    raise Race(f"{line} {'writes' if writing else 'reads'} what {other} has in use")
            before.append((line, clock[line], writing))

    def wait_for_all(self) -> None:
        for clock in list(self.clocks.values()):
            self.learn(self.host, clock)

    def turn_to(self, host: str) -> None:
        """Another thread calls: it takes the lock that this one has let go."""
        known = dict(self.clock(self.host))
        self.host = host
        self.learn(host, known)

    def buffer(self, shape: tuple[int, ...], dtype: Any = None, **_: Any) -> Buffer:
        values = np.zeros(shape, np.uint8 if dtype is torch.uint8 else np.float32)
        self.bases.append(values)
        return Buffer(self, values, id(values), dtype)


class Buffer:
    """A tensor of which every use is noted; copies happen at once, only their order is in question."""

    def __init__(self, machine: Machine, values: np.ndarray, base: int, dtype: Any) -> None:
        self.machine, self.values, self.base, self.dtype = machine, values, base, dtype
        self.shape = values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> Buffer:
        return Buffer(self.machine, self.values[rows], self.base, self.dtype)

    def __setitem__(self, rows: slice, values: Any) -> None:
        self.machine.work(self.machine.host, [], [self])
        self.values[rows] = values

    def numpy(self) -> Buffer:
        return self

    def copy_(self, source: Buffer, non_blocking: bool) -> None:
        assert non_blocking
        self.machine.work(self.machine.stream, [source], [self])
        self.values[:] = source.values

    def read(self) -> np.ndarray:
        self.machine.work(self.machine.host, [self], [])
        return self.values


class Stream:
    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name

    def wait_event(self, event: Event) -> None:
        self.machine.learn(self.name, event.clock)


class Event:
    def __init__(self, machine: Machine, blocking: bool) -> None:
        self.machine, self.blocking, self.clock = machine, blocking, Clock()

    def record(self, stream: Stream) -> None:
        self.machine.learn(stream.name, self.machine.clock(self.machine.host))
        self.clock = dict(self.machine.clock(stream.name))

    def synchronize(self) -> None:
        assert self.blocking, "the host would spin on a core until then"
        self.machine.learn(self.machine.host, self.clock)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    names = iter(("copying in", "copying out"))

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, machine.stream = machine.stream, stream.name
        yield
        machine.stream = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(machine, next(names)))
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking=False: Event(machine, blocking))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(machine, machine.stream))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(machine, "stream", stream.name))
    monkeypatch.setattr(torch.cuda, "synchronize", machine.wait_for_all)
    monkeypatch.setattr(torch, "zeros", machine.buffer)
    monkeypatch.setattr(torch, "empty", machine.buffer)
    return machine


def made(machine: Machine, *, graphs: bool = False) -> Runner:
    """Its forward pass gives the sum of a picture, in one place for each buffer of pixels, as a graph's is."""
    places: dict[int, Buffer] = {}

    def forward(pixels: Any) -> list[Any]:
        place = places.setdefault(pixels.base, machine.buffer((BATCH,)))
        machine.work(machine.stream, [pixels], [place])
        place.values[:] = pixels.values.sum(axis=(1, 2, 3))
        return [place]

    return Runner(forward, batch=BATCH, shape=SHAPE, device=torch.device("cuda"), graphs=graphs)


def three_calls(machine: Machine) -> None:
    """Of one batch, of several, of an odd number; of two threads, of which each waits while the other's call runs."""
    runner = made(machine)
    for counts in ((4, 11, 2), (9, 9, 9), (17, 1, 8)):
        waiting: list[tuple[str, Underway, np.ndarray]] = []
        for number, count in enumerate((*counts, 0, 0)):
            if count:
                machine.turn_to(f"caller {number % 2}")
                pixels = np.random.default_rng(count).integers(0, 256, (count, *SHAPE), np.uint8)
                waiting.append((machine.host, runner.start(pixels), pixels))
            if len(waiting) > 1 or (waiting and not count):
                machine.host, underway, pixels = waiting.pop(0)
                (found,) = underway.results()
                assert found.read().tolist() == pixels.sum(axis=(1, 2, 3)).tolist()


def test_no_two_streams_meet_in_a_buffer(machine: Machine) -> None:
    three_calls(machine)


def nothing(*arguments: Any) -> None:
    pass


def without_waits_for(*kinds: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Leave out the waits of a stream for the events of these lists."""

    def change(monkeypatch: pytest.MonkeyPatch) -> None:
        real, init = Runner._wait, Runner._warm_up
        left_out: list[Any] = []

        def warm_up(self: Runner, graphs: bool) -> None:
            left_out.extend(event for kind in kinds for event in getattr(self, kind))
            init(self, graphs)

        monkeypatch.setattr(Runner, "_warm_up", warm_up)
        wait = lambda stream, event: None if event in left_out else real(stream, event)  # noqa: E731
        monkeypatch.setattr(Runner, "_wait", staticmethod(wait))

    return change


@pytest.mark.parametrize(
    "change",
    [
        without_waits_for("_arrived"),
        without_waits_for("_computed"),
        without_waits_for("_fetched"),
        lambda monkeypatch: monkeypatch.setattr(Event, "synchronize", nothing),
    ],
)
def test_each_wait_is_needed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    change(monkeypatch)
    with pytest.raises(Race):
        three_calls(machine)


def test_each_runner_captures_on_a_stream_of_its_own(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS has one workspace for each stream, which goes with the first graph that was captured on it."""
    on: list[Stream] = []

    @contextmanager
    def graph(graph: Any, *, stream: Stream) -> Iterator[None]:
        on.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(machine, "one of many"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    for _ in range(2):
        made(machine, graphs=True)
    assert on[0] is on[1]
    assert on[2] is on[3]
    assert on[0] is not on[2]


def test_a_capture_that_fails_leaves_its_thread_on_the_stream_it_had(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's own: what the end of a capture raises skips the way back to the stream before."""

    @contextmanager
    def graph(graph: Any, *, stream: Stream) -> Iterator[None]:
        machine.stream = stream.name
        yield
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(machine, "capturing"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(torch.OutOfMemoryError):
        made(machine, graphs=True)
    assert machine.stream == "computing"
