"""Commit blocks as they come off the stream: a part each time enough bytes or seconds have gathered.

The driver holds references only. Grouping happens here rather than in a Ray Data write stage, because such a stage
is scheduled behind everything upstream of it on a busy machine, and knows no clock: a crash would lose all.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline import logs, metrics
from pipeline.placement import MOST_WRITES
from pipeline.sinks.attempts import Fence
from pipeline.sinks.parts import split, write_part
from pipeline.storage import filesystem, redact
from schemas.attempt import StageSeconds
from schemas.losses import unwrap
from schemas.spec import SinkSpec

_TICK_S = 0.2
# What a signal leaves time for: Kubernetes grants 30 s before it kills.
_DRAIN_S = 15.0
# Blocks between the stream and the driver. Nothing counts their bytes or their age: Ray Data holds the stream back by
# what it has not yet given out.
_FED = 2
# For Ray Data to end an execution.
_STOP_S = 5.0

log = logging.getLogger(__name__)


class WriteJob(NamedTuple):
    """All that a write task needs besides the rows."""

    fence: Fence
    images_schema: pa.Schema
    metadata: bytes
    run_id: str


class Committed(NamedTuple):
    """What one write made visible."""

    images: int
    failures: int
    parts: int
    seconds: StageSeconds
    failures_by_stage: dict[str, int]


def write_blocks(job: WriteJob, *blocks: pa.Table) -> Committed:
    """Write the rows of `blocks` as at most one part of images and one of failures."""
    started = time.perf_counter()
    predicted = pa.concat_tables(blocks, promote_options="permissive")
    rows = pc.min_max(predicted["row"]).as_py()
    logs.working_on(job.run_id, "write", rows["min"], rows["max"])
    images, failures = split(predicted, job.images_schema)
    fs, path = filesystem(job.fence.out, job.fence.storage_options)
    written = [
        write_part(fs, path, "images", images, job.metadata, job.fence.check),
        write_part(fs, path, "failures", failures, job.metadata, job.fence.check),
    ]
    seconds = StageSeconds(
        fetch=_total(predicted, "fetch_s"),
        decode=_total(predicted, "decode_s"),
        predict=_total(predicted, "predict_s"),
        write=time.perf_counter() - started,
    )
    by_stage = {item["values"]: item["counts"] for item in pc.value_counts(failures["stage"]).to_pylist()}
    parts = sum(part is not None for part in written)
    logs.event("committed", images=len(images), failures=by_stage, parts=parts, seconds=seconds.model_dump())
    return Committed(len(images), len(failures), parts, seconds, by_stage)


class Received(NamedTuple):
    """Progress between commits: rows that came off the stream and are on their way to a part."""

    rows: int


def commit_stream(
    bundles: Generator[Any, None, None], job: WriteJob, sink: SinkSpec, late: Callable[[Committed], None]
) -> Generator[Received | Committed | None, None, None]:
    """Drive `bundles` (Ray Data's block references) to their end and write them.

    Yields what happened, and None about five times a second when nothing did. If the caller closes the generator
    early, or the stream or a write fails, what was received is still written, for at most 15 seconds, and `late` is
    told. Errors come as Ray has them: `losses.unwrap` is for the caller, once.
    """
    writes = _Writes(job)
    feed = _Feed(bundles)
    try:
        for bundle in feed:
            if bundle is not None:
                writes.add(bundle)
                yield Received(bundle.num_rows() or 0)
            if writes.bytes >= sink.part_bytes or writes.waited_s >= sink.commit_s:
                writes.submit()
            yield from writes.finished(wait=len(writes.running) >= MOST_WRITES)
            yield None
        writes.submit()
        while writes.running:
            yield from writes.finished(wait=True)
    except BaseException as cause:
        feed.stop()
        for committed in writes.drain(_DRAIN_S, cause):
            late(committed)
        raise
    finally:
        feed.stop()


class _Feed:
    """Iterates `bundles` in a thread, so that the caller's clock ticks while the stream is silent."""

    def __init__(self, bundles: Generator[Any, None, None]) -> None:
        self._bundles = bundles
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=_FED)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="patchstream-feed", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            # Closed here when nobody wants more: an execution that is left to the garbage collector goes on using
            # the cluster, and tidies up when Ray may be gone.
            with contextlib.closing(self._bundles):
                for bundle in self._bundles:
                    if not self._put(("bundle", bundle)):
                        return
            self._put(("end", None))
        except BaseException as error:  # noqa: BLE001 - handed over to the caller's thread, which raises it
            self._put(("error", _without_frames(error)))

    def _put(self, item: tuple[str, Any]) -> bool:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=_TICK_S)
                return True
        return False

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                kind, value = self._queue.get(timeout=_TICK_S)
            except queue.Empty:
                yield None
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(_STOP_S)


def _without_frames(error: BaseException) -> BaseException:
    """`error` and its causes without their tracebacks: Ray Data's frames hold handles of actors, which would stay, with
    the CPUs that they booked, for as long as somebody keeps the error. The worker's own traceback is in its text.
    """
    seen: BaseException | None = error
    while seen is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    return error


class _Writes:
    """Gathers block references and keeps the write tasks in flight."""

    def __init__(self, job: WriteJob) -> None:
        self._job = ray.put(job)
        # No CPU is asked for: a write waits on the disk or the network, and must not queue behind decoding.
        self._task: Callable[..., Any] = ray.remote(num_cpus=0, max_retries=3)(write_blocks).remote
        self._blocks: list[Any] = []
        self._since = 0.0
        self.bytes = 0
        self.running: list[Any] = []

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._since if self._blocks else 0.0

    def add(self, bundle: Any) -> None:
        if not self._blocks:
            self._since = time.monotonic()
        self._blocks += bundle.block_refs
        self.bytes += bundle.size_bytes()

    def submit(self) -> None:
        if self._blocks:
            self.running.append(self._task(self._job, *self._blocks))
            self._blocks, self.bytes = [], 0

    def finished(self, *, wait: bool) -> Iterator[Committed]:
        if not self.running:
            return
        ready, _ = ray.wait(self.running, num_returns=len(self.running) if not wait else 1, timeout=None if wait else 0)
        for reference in ready:
            try:
                committed = _result(reference)
            except Exception:
                self.running.remove(reference)
                raise
            # Only now: of what is not told yet, `drain` tells.
            self.running.remove(reference)
            yield committed

    def drain(self, limit_s: float, cause: BaseException) -> Iterator[Committed]:
        """Write what is held, for at most `limit_s` seconds. What fails is told, and its rows stay pending; `cause` is
        not told, for the job ends of it."""
        told = {str(unwrap(cause))}
        ready: list[Any] = []
        # Here an error must hide neither why the job ends nor the other writes.
        try:
            self.submit()
            if self.running:
                ready, _ = ray.wait(self.running, num_returns=len(self.running), timeout=limit_s)
        except Exception as error:  # noqa: BLE001
            _warn(error, told)
        for reference in ready:
            try:
                committed = _result(reference)
            except Exception as error:  # noqa: BLE001
                _warn(error, told)
                continue
            yield committed


def _warn(error: Exception, told: set[str]) -> None:
    message = str(unwrap(error))
    if message not in told:
        log.warning("a last write failed, its rows stay pending: %s", redact(message))
        told.add(message)


def _result(reference: Any) -> Committed:
    committed: Committed = ray.get(reference)
    metrics.count("patchstream_images_total", committed.images)
    for stage, failures in committed.failures_by_stage.items():
        metrics.count("patchstream_failures_total", failures, stage=stage)
    for stage, seconds in committed.seconds.model_dump().items():
        metrics.count("patchstream_stage_seconds_total", seconds, stage=stage)
    return committed


def _total(table: pa.Table, column: str) -> float:
    return float(pc.sum(table[column]).as_py() or 0.0)
