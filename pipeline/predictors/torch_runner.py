"""Batches through a network with the copies hidden: two of everything, and a stream for each direction.

While batch i computes, batch i + 1 is written into page-locked memory and copied over, and the results of batch i − 1
are copied back. A call goes on where the one before stopped, whose last batch may still compute. All batches have one
size, so that a CUDA graph can replay the forward pass; the last is padded. On a CPU the same steps run one after the
other on the same buffers.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.models.gpu import Compiled
from schemas.redaction import named

Forward = Callable[[Tensor], Sequence[Tensor]]
SLOTS = 2
_WARM_UPS = 3

_log = logging.getLogger(__name__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what lies beneath it, which the end of a capture hides."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def describe_error(error: BaseException) -> str:
    """`error` and what lies beneath it, in one line."""
    return "; beneath it ".join(named(link)[:500] for link in _chain(error))


def _lacks_memory(error: BaseException) -> bool:
    """Whether the device had no room, whoever says so: torch's allocator, CUDA, cuBLAS, or one of them beneath what the
    end of a capture raised over it."""
    for link in _chain(error):
        said = "out of memory" in str(link) or "CUBLAS_STATUS_ALLOC_FAILED" in str(link)
        if isinstance(link, torch.OutOfMemoryError) or (isinstance(link, RuntimeError) and said):
            return True
    return False


@contextmanager
def _memory_errors() -> Iterator[None]:
    """A lack of memory is a torch.OutOfMemoryError, whoever says so."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not _lacks_memory(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


class _CaptureError(RuntimeError):
    """No graph can be captured of a forward pass that runs."""


class Underway(NamedTuple):
    """A call whose batches have been handed to the device."""

    found: list[Tensor]
    fetched: Any

    def results(self) -> list[Tensor]:
        """Each (n, …) on the host, once it is there."""
        if self.fetched is not None:
            self.fetched.synchronize()
        return self.found


class Runner:
    """Runs `forward` on batches of `batch` images of `shape` (H, W, 3). Warm when the constructor returns.

    `attention` names the kernels in the order in which torch may take them; none leaves it to torch. What raises while
    it warms up is taken out of the order, so that one that fails on a machine costs that machine its speed alone. Where
    no graph can be captured it runs without `graphs`.

    Raises torch.OutOfMemoryError where the batch is too large for the device.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        batch: int,
        shape: tuple[int, ...],
        device: torch.device,
        graphs: bool,
        attention: Sequence[str] = (),
    ) -> None:
        self.batch = batch
        self.attention = tuple(attention)
        self._cuda = device.type == "cuda"
        self._forward = forward
        self._host = [torch.zeros((batch, *shape), dtype=torch.uint8, pin_memory=self._cuda) for _ in range(SLOTS)]
        self._device = [torch.zeros((batch, *shape), dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._in: Any = torch.cuda.Stream() if self._cuda else None  # type: ignore[no-untyped-call]
        self._out: Any = torch.cuda.Stream() if self._cuda else None  # type: ignore[no-untyped-call]
        # What has happened to a slot: its pixels have arrived, its results exist, its results have been fetched.
        self._arrived, self._computed, self._fetched = ([self._event() for _ in range(SLOTS)] for _ in range(3))
        self._results: list[list[Tensor]] = [[] for _ in range(SLOTS)]
        self._graphs: list[Any] = []
        self._slot = 0
        with _memory_errors():
            self._warm_up(graphs and self._cuda)

    def run(self, pixels: npt.NDArray[np.uint8]) -> list[Tensor]:
        """Results for `pixels` (n, H, W, 3), n > 0: each (n, …) on the host."""
        return self.start(pixels).results()

    @_memory_errors()
    def start(self, pixels: npt.NDArray[np.uint8]) -> Underway:
        """`run` without the wait for the results. For one thread at a time; `pixels` are no longer needed afterwards.

        Raises torch.OutOfMemoryError where the device lacks memory.
        """
        count = len(pixels)
        found = [
            torch.empty((count, *result.shape[1:]), dtype=result.dtype, pin_memory=self._cuda)
            for result in self._results[0]
        ]
        for start in range(0, count, self.batch):
            stop = start + self.batch
            # In this order the host writes the next batch while this one computes.
            self._send(self._slot, pixels[start:stop])
            self._compute(self._slot)
            self._fetch(self._slot, [result[start:stop] for result in found])
            self._slot = (self._slot + 1) % SLOTS
        fetched = self._event()
        self._record(fetched, self._out)
        return Underway(found, fetched)

    def _warm_up(self, graphs: bool) -> None:
        order = self.attention
        uncaptured = self._choose_kernels(graphs)
        if not uncaptured:
            return
        if self.attention != order:
            self.attention = order
            torch.compiler.reset()
        self._choose_kernels(graphs=False)
        _log.warning("no CUDA graph can be captured here, so it goes without: %s", uncaptured)

    def _choose_kernels(self, graphs: bool) -> str:
        """Each kernel of `attention` that raises is dropped. Where the last one raises too it is not for want of a
        kernel, and what the first one raised is raised.

        A capture is tried with one other kernel, as each may have to be compiled, for a minute. Where that one fails
        too, or none is left, it is why the first failed that is returned, and nothing is captured.
        """
        failed: list[tuple[str, RuntimeError]] = []
        uncaptured = ""
        while True:
            try:
                for _ in range(_WARM_UPS):
                    for slot in range(SLOTS):
                        self._run_forward(slot)
                if self._cuda:
                    torch.cuda.synchronize()  # what a kernel raises comes here, and not with a later batch
                self._graphs = self._captured() if graphs else []
                break
            except RuntimeError as error:
                if uncaptured:
                    return uncaptured  # the kernel before runs, if not in a graph
                # Kinds of it are other things: no memory, a device that is lost, a compiler that fails after a minute.
                if type(error) not in (RuntimeError, _CaptureError) or _lacks_memory(error):
                    raise
                if isinstance(error, _CaptureError):
                    uncaptured = str(error)
                if len(self.attention) < 2:
                    if uncaptured:
                        return uncaptured
                    raise (failed[0][1] if failed else error) from None
                failed.append((self.attention[0], error.with_traceback(None)))
            self.attention = self.attention[1:]
            torch.compiler.reset()  # what was compiled has the kernel in it
        for name, reason in failed:
            _log.warning("attention by %s fails here, so it goes without: %s", name, reason)
        return ""

    def _run_forward(self, slot: int) -> None:
        with self._kernels():
            self._results[slot] = list(self._forward(self._device[slot]))

    def _kernels(self) -> AbstractContextManager[Any]:
        if not self.attention:
            return nullcontext()
        return sdpa_kernel([getattr(SDPBackend, name) for name in self.attention], set_priority=True)

    def _send(self, slot: int, part: npt.NDArray[np.uint8]) -> None:
        if self._cuda:
            self._arrived[slot].synchronize()  # the page-locked buffer is read until then
        host = self._host[slot].numpy()
        host[: len(part)] = part
        host[len(part) :] = 0
        with self._on(self._in):
            self._wait(self._in, self._computed[slot])  # the device's buffer is read until then
            self._device[slot].copy_(self._host[slot], non_blocking=True)
            self._record(self._arrived[slot], self._in)

    def _compute(self, slot: int) -> None:
        current = torch.cuda.current_stream() if self._cuda else None
        self._wait(current, self._arrived[slot])
        self._wait(current, self._fetched[slot])  # the results of two batches ago lie in the same place
        if self._graphs:
            self._graphs[slot].replay()
        else:
            self._run_forward(slot)
        self._record(self._computed[slot], current)

    def _fetch(self, slot: int, targets: list[Tensor]) -> None:
        with self._on(self._out):
            self._wait(self._out, self._computed[slot])
            for target, result in zip(targets, self._results[slot], strict=True):
                target.copy_(result[: len(target)], non_blocking=True)
            self._record(self._fetched[slot], self._out)

    def _captured(self) -> list[Any]:
        """A graph of the forward pass for each slot.

        On a stream on which no other runner captures: cuBLAS has one workspace for each stream, in the memory of the
        first graph there. It would go with that runner, and still stand in the graphs of the others.

        Raises _CaptureError where another reason than memory forbids it.
        """
        stream, before = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        graphs = [torch.cuda.CUDAGraph() for _ in range(SLOTS)]
        try:
            for slot, graph in enumerate(graphs):
                with torch.cuda.graph(graph, stream=stream):
                    self._run_forward(slot)
            return graphs
        except RuntimeError as error:
            if _lacks_memory(error):
                raise
            reason = describe_error(error)
        finally:
            torch.cuda.set_stream(before)  # where a capture fails as it ends, torch leaves this thread on its stream
        # Behind the block: in it the error would have as its context what holds the tensors on the device.
        raise _CaptureError(reason)

    def _event(self) -> Any:
        # The host sleeps until then, and does not spin: the decoders beside it have use for the core.
        return torch.cuda.Event(blocking=True) if self._cuda else None  # type: ignore[no-untyped-call]

    def _on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream) if stream is not None else nullcontext()

    @staticmethod
    def _wait(stream: Any, event: Any) -> None:
        if stream is not None:
            stream.wait_event(event)

    @staticmethod
    def _record(event: Any, stream: Any) -> None:
        if stream is not None:
            event.record(stream)


def compile_trunk(trunk: Any, what: Compiled) -> None:
    """Have `what` of a network compiled when it first runs, for the shape it then gets. All blocks are of one shape, so
    that the code of one does for the others."""
    parts = {"nothing": [], "blocks": [*trunk.blocks, trunk.prefix_block], "trunk": [trunk]}[what]
    for part in parts:
        if part is not None:
            part.compile(dynamic=False)
