"""The batch size that a GPU is found to be fastest with, on a device with a clock of its own; and a smaller one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint
from torch._dynamo.exc import BackendCompilerFailed

from pipeline.models import ModelInfo, inspect_model
from pipeline.models.gpu import GpuPlan
from pipeline.predictors import torch_predictor
from pipeline.predictors.batches import Wanted
from pipeline.predictors.torch_predictor import TorchPredictor
from pipeline.predictors.torch_runner import Runner, compile_trunk

SIDE = 32


class Device:
    """`seconds` that a batch of a size computes, one batch after the other; copies and the host take no time."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self.now = 0.0
        self.stream = Stream(self)

    def forward(self, batch: torch.Tensor) -> Sequence[torch.Tensor]:
        self.stream.ends = max(self.stream.ends, self.now) + self.seconds[len(batch)]
        return (batch[:, 0, 0, 0],)

    def synchronize(self) -> None:
        self.now = max(self.now, self.stream.ends)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before


class Stream:
    def __init__(self, device: Device) -> None:
        self.device, self.ends = device, 0.0

    def wait_event(self, event: Event) -> None:
        self.ends = max(self.ends, event.at)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self, stream: Stream) -> None:
        self.at = max(stream.ends, self.device.now)

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.at)


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    folder = make_checkpoint(tmp_path_factory.mktemp("vit"), "vit-classifier", image_size=SIDE, patch_size=8)
    return inspect_model(str(folder))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(device))
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking=False: Event(device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: device.stream)
    monkeypatch.setattr(torch.cuda, "stream", device.on)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(torch_predictor, "time", SimpleNamespace(perf_counter=lambda: device.now))
    return device


def wanting(info: ModelInfo) -> Wanted:
    return Wanted(("cls",), (info.hidden_size,), "float32", 0, info.labels, False)


@pytest.fixture
def make_predictor(
    info: ModelInfo, device: Device, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, int], TorchPredictor]:
    """One that has begun on a CPU, by batch size and the images of a call, and goes on on `device`."""

    def make(batch: int, call_rows: int) -> TorchPredictor:
        predictor = TorchPredictor(info, wanting(info), dtype="float32", batch_size=batch, call_rows=call_rows)
        monkeypatch.setattr(predictor, "_device", torch.device("cuda"))
        monkeypatch.setattr(predictor, "_forward", device.forward)
        in_host_memory(monkeypatch)
        return predictor

    return make


def in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for on the device, or page-locked."""
    for name in ("zeros", "empty"):
        real: Any = getattr(torch, name)
        plain = lambda shape, *, dtype, real=real, **_: real(shape, dtype=dtype)  # noqa: E731
        monkeypatch.setattr(torch, name, plain)


@pytest.mark.parametrize(("batches", "flattered"), [(1, 1), (2, 1), (3, 1), (4, 1), (6, 12 / 10), (8, 16 / 12)])
def test_calls_of_more_than_four_batches_are_timed_too_late(
    device: Device, monkeypatch: pytest.MonkeyPatch, batches: int, flattered: float
) -> None:
    """The second call's `start` waits within the call then, when the first one's results are long there."""
    in_host_memory(monkeypatch)
    device.seconds = {4: 0.5}
    runner = Runner(device.forward, batch=4, shape=(2, 2, 3), device=torch.device("cuda"), graphs=False)
    rate = torch_predictor._images_per_s(runner, np.zeros((4 * batches, 2, 2, 3), np.uint8))
    assert rate == pytest.approx(flattered * 4 / 0.5)


@pytest.mark.parametrize("call_rows", [0, 8, 16, 20, 32, 64])
@pytest.mark.parametrize(("half_s", "best"), [(0.625, 8), (0.5, 4)])
def test_the_batch_size_that_is_faster_is_taken(
    device: Device,
    make_predictor: Callable[[int, int], TorchPredictor],
    call_rows: int,
    half_s: float,
    best: int,
) -> None:
    """However many images a call brings: of two that are as fast the smaller."""
    device.seconds = {8: 1.0, 4: half_s}
    predictor = make_predictor(8, call_rows)
    assert predictor._fastest().batch == predictor.batch_size == best


@pytest.mark.parametrize("fits", [1, 2, 4, 8])
def test_what_lacks_memory_as_it_is_timed_is_halved(
    device: Device, make_predictor: Callable[[int, int], TorchPredictor], monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    """Another actor of the GPU may have taken what was free when the kernels were chosen."""
    device.seconds = {size: float(size) for size in (16, 8, 4, 2, 1)}
    predictor = make_predictor(16, 0)
    start, made = Runner.start, predictor._made
    alive: weakref.WeakSet[Runner] = weakref.WeakSet()

    def lacking(runner: Runner, pixels: Any) -> Any:
        if runner.batch > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return start(runner, pixels)

    def remember(batch: int) -> Runner:
        assert batch < fits or not alive, "what was too large has the memory still"
        runner = made(batch)
        alive.add(runner)
        return runner

    monkeypatch.setattr(Runner, "start", lacking)
    monkeypatch.setattr(predictor, "_made", remember)
    assert predictor._fastest().batch == predictor.batch_size == max(1, fits // 2), "as fast as the larger"


@torch.inference_mode()
def test_what_is_compiled_is_compiled_for_each_smaller_batch(
    info: ModelInfo, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Dynamo runs a function that has been compiled for eight shapes as it is for any other."""
    compiled: list[int] = []

    def remember(graph: Any, inputs: Sequence[Any]) -> Any:
        compiled.append(max(given.shape[0] for given in inputs if given.dim() == 3))
        return graph.forward

    predictor = TorchPredictor(info, wanting(info), dtype="float8", batch_size=512)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=remember))
    torch.compiler.reset()
    request.addfinalizer(torch.compiler.reset)
    compile_trunk(predictor._model.trunk, "blocks")
    monkeypatch.setattr(predictor, "_plan", GpuPlan((), "blocks", graphs=False))
    sizes = [256, 128, 64, 32, 16, 8, 4, 2, 1]
    for _ in sizes:
        predictor._smaller()
    assert sorted(set(compiled), reverse=True) == sizes


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_a_smaller_batch_that_cannot_be_compiled_runs_as_it_is_in_any_thread(
    info: ModelInfo, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, dtype: str
) -> None:
    """Not in float8, which is slower than bfloat16 then. A call that lacks memory need not be of the first thread."""

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("no kernel can be built in a read-only home")

    predictor = TorchPredictor(info, wanting(info), dtype=dtype, batch_size=4)
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    expected = predictor.predict(pixels)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fails))
    torch.compiler.reset()
    request.addfinalizer(torch.compiler.reset)  # dynamo passes over a function that has failed
    compile_trunk(predictor._model.trunk, "trunk")
    monkeypatch.setattr(predictor, "_plan", GpuPlan((), "trunk", graphs=False))
    full = Runner(lambda batch: (batch,), batch=4, shape=(1, 1, 3), device=torch.device("cpu"), graphs=False)
    monkeypatch.setattr(full, "start", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    monkeypatch.setattr(predictor, "_runner", full)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(predictor.predict, pixels)
    if dtype == "float8":
        with pytest.raises(BackendCompilerFailed, match="read-only home"):
            found.result()
        return
    np.testing.assert_allclose(found.result().features["cls"], expected.features["cls"], atol=0.05)
    assert predictor.batch_size == 2
