"""CUDA graphs that cannot be captured, on a device that is the host: what is tried, what is told, and what runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from pipeline.predictors.torch_runner import Runner

SHAPE = (2, 2, 3)
ALL = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
ENABLED = dict(zip(ALL, ("cudnn", "flash", "mem_efficient", "math"), strict=True))


def taken() -> str:
    """The first kernel that torch may take here."""
    return next(name for name, flag in ENABLED.items() if getattr(torch.backends.cuda, f"{flag}_sdp_enabled")())


class Device:
    """`captures`: the kernel that each was tried with. Which kernels fail, and which as they are captured, is set."""

    def __init__(self) -> None:
        self.captures: list[str] = []
        self.ran = ""
        self.fails_captured: Callable[[str], bool] = lambda kernel: False
        self.fails: Callable[[str], bool] = lambda kernel: False

    @contextmanager
    def graph(self, graph: Any, *, stream: Any) -> Iterator[None]:
        """As torch's own: its end raises over what went wrong in it."""
        yield
        self.captures.append(self.ran)
        if self.fails_captured(self.ran):
            try:
                raise RuntimeError("no plan for these shapes")
            except RuntimeError:
                raise torch.AcceleratorError("failed due to a previous error during capture")  # noqa: B904

    def runner(self, *attention: str) -> Runner:
        def forward(batch: torch.Tensor) -> Sequence[torch.Tensor]:
            self.ran = taken()
            if self.fails(self.ran):
                raise RuntimeError("no kernel image")
            return (batch.float().sum(dim=(1, 2, 3)),)

        device = torch.device("cuda")
        return Runner(forward, batch=4, shape=SHAPE, device=device, graphs=True, attention=attention)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    for name in ("Stream", "Event", "CUDAGraph", "current_stream", "set_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", device.graph)
    for name in ("zeros", "empty"):  # on the device, or page-locked
        real: Any = getattr(torch, name)
        plain = lambda shape, *, dtype, real=real, **_: real(shape, dtype=dtype)  # noqa: E731
        monkeypatch.setattr(torch, name, plain)
    return device


def test_a_kernel_that_cannot_be_captured_is_left_out(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    device.fails_captured = lambda kernel: kernel == "CUDNN_ATTENTION"
    runner = device.runner(*ALL)
    assert runner.attention == ALL[1:]
    assert len(runner._graphs) == 2
    assert device.captures == ["CUDNN_ATTENTION", "FLASH_ATTENTION", "FLASH_ATTENTION"]
    assert "attention by CUDNN_ATTENTION fails here" in caplog.text
    assert "during capture; beneath it RuntimeError: no plan for these shapes" in caplog.text


@pytest.mark.parametrize(
    ("attention", "fails", "tried"),
    [
        (ALL, (), ("CUDNN_ATTENTION", "FLASH_ATTENTION")),
        (ALL, ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"), ("CUDNN_ATTENTION",)),
        (ALL[1:], ("FLASH_ATTENTION",), ("EFFICIENT_ATTENTION", "MATH")),
        (("MATH",), (), ("MATH",)),
        ((), (), ("CUDNN_ATTENTION",)),
    ],
)
def test_where_no_graph_can_be_captured_it_runs_without(
    device: Device,
    caplog: pytest.LogCaptureFixture,
    attention: Sequence[str],
    fails: Sequence[str],
    tried: Sequence[str],
) -> None:
    """By the fastest kernel that does not fail without: it is not for want of one."""
    device.fails, device.fails_captured = lambda kernel: kernel in fails, lambda kernel: True
    runner = device.runner(*attention)
    assert runner._graphs == []
    assert device.captures == list(tried)
    assert runner.attention == tuple(attention[len(attention) > 0 and attention[0] in fails :])
    pixels = np.arange(9 * 12, dtype=np.uint8).reshape(9, *SHAPE)
    (found,) = runner.run(pixels)
    assert found.tolist() == pixels.sum(axis=(1, 2, 3)).tolist()
    assert "no CUDA graph can be captured here" in caplog.text
    assert "beneath it RuntimeError: no plan for these shapes" in caplog.text


def test_a_kernel_that_is_tried_for_its_capture_alone_may_lack_memory(device: Device) -> None:
    def lacks(kernel: str) -> bool:
        if kernel == "FLASH_ATTENTION":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return False

    device.fails, device.fails_captured = lacks, lambda kernel: True
    runner = device.runner("CUDNN_ATTENTION", "FLASH_ATTENTION")
    assert (runner._graphs, runner.attention) == ([], ("CUDNN_ATTENTION", "FLASH_ATTENTION"))


def test_a_capture_that_lacks_memory_is_not_tried_with_another_kernel(device: Device) -> None:
    def lacks(kernel: str) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    device.fails_captured = lacks
    with pytest.raises(torch.OutOfMemoryError):
        device.runner(*ALL)
    assert device.captures == ["CUDNN_ATTENTION"]
