"""The Triton predictor: the same tables as the torch predictor, computed by a server.

Several requests are in flight, each on a connection of its own. While the server is away its rows wait; after
`outage_s` they become retryable failures, and so do all that follow, at once, until it answers again.
"""

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.models import ModelInfo
from pipeline.predictors.batches import (
    Predictions,
    Wanted,
    failed_table,
    good_rows,
    pixels_of,
    predicted_table,
    top_labels,
)
from pipeline.predictors.triton_connection import Connection, DeadlineMissed, ServerAway, ServerError
from pipeline.predictors.triton_protocol import LOGITS, ServedModel, check_model, default_model_name
from schemas.errors import ClusterError, SpecError
from schemas.spec import TritonSpec

_log = logging.getLogger(__name__)

CONNECT_S = 10.0
# Tries for one request that the server answers with an error, or not in time although it answers others.
ATTEMPTS = 4
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0

Floats = npt.NDArray[np.float32]


class Failed(NamedTuple):
    """Why a request was given up: what its rows of `failures/` record."""

    error: str
    message: str


class Outage:
    """Since when nobody has answered, for all requests of a predictor together."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._since: float | None = None
        self._lock = threading.Lock()

    def answered(self) -> None:
        with self._lock:
            self._since = None

    def remaining_s(self) -> float:
        """How much longer to wait, called when a request found nobody; not above 0 once the limit has passed."""
        with self._lock:
            if self._since is None:
                self._since = self._clock()
                _log.warning("the Triton server does not answer; its rows wait up to %g s", self._limit_s)
            return self._limit_s - (self._clock() - self._since)

    @property
    def is_over_limit(self) -> bool:
        with self._lock:
            return self._since is not None and self._clock() - self._since >= self._limit_s


class TritonPredictor:
    """Runs the model `spec.model_name`, by default the one that `export-triton` made of `info`, served in `dtype`. A
    request has `batch_size` images; without one a table is cut into as many requests as may be in flight."""

    def __init__(
        self, info: ModelInfo, wanted: Wanted, dtype: str, spec: TritonSpec, batch_size: int | None = None
    ) -> None:
        self._wanted = wanted
        self._spec = spec
        self._batch_size = batch_size
        self._image_size = info.image_size
        self._connect = partial(connect, info, wanted, dtype, spec)
        self._outage = Outage(spec.outage_s)
        self._threads = ThreadPoolExecutor(spec.in_flight, thread_name_prefix="triton")
        # One slot for each request in flight; an empty one connects when it is used.
        self._slots: queue.SimpleQueue[Connection | None] = queue.SimpleQueue()
        for _ in range(spec.in_flight):
            self._slots.put(None)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Predicted table for a decoded one. Raises SpecError if the server holds another model."""
        started = time.perf_counter()
        pixels = pixels_of(decoded, *self._image_size)
        share = self._batch_size or max(1, -(-len(pixels) // self._spec.in_flight))
        parts = [pixels[start : start + share] for start in range(0, len(pixels), share)]
        results = list(self._threads.map(self._request, parts))
        predictions = self._predictions([result for result in results if not isinstance(result, Failed)])
        seconds = time.perf_counter() - started
        good = good_rows(decoded)
        failed = {
            int(row): result
            for number, result in enumerate(results)
            if isinstance(result, Failed)
            for row in good[number * share : (number + 1) * share]
        }
        if failed:
            return self._mixed_table(decoded, failed, predictions, seconds)
        return predicted_table(decoded, good, predictions, self._wanted, seconds)

    def close(self) -> None:
        """End the connections."""
        self._threads.shutdown()
        while not self._slots.empty():
            drop(self._slots.get())

    def _request(self, pixels: npt.NDArray[np.uint8]) -> Mapping[str, Floats] | Failed:
        """Outputs for some rows, tried until the server answers or the limits of outage and attempts are reached."""
        connection = self._slots.get()
        pause_s, misses = _FIRST_PAUSE_S, 0
        try:
            while True:
                if self._outage.is_over_limit:
                    # Connecting tells soon whether it is back; if so, its first answers may take as long as any.
                    drop(connection)
                    connection = None
                try:
                    if connection is None:
                        connection = self._connect(min(CONNECT_S, self._spec.deadline_s))
                    outputs = connection.infer(pixels, self._spec.deadline_s)
                    self._outage.answered()
                    return outputs
                except ServerAway as error:
                    drop(connection)
                    connection = None
                    patience_s = self._outage.remaining_s()
                    misses += isinstance(error, DeadlineMissed)
                    if patience_s <= 0 or misses >= ATTEMPTS:
                        return Failed("ServerAway", f"no answer from {self._spec.url}: {error}")
                except ServerError as error:
                    # A server that was away while this connection slept answers too, but has none of its memory.
                    drop(connection)
                    connection = None
                    self._outage.answered()
                    patience_s = _LONGEST_PAUSE_S
                    misses += 1
                    if misses >= ATTEMPTS:
                        return Failed("ServerError", f"{self._spec.url} failed {misses} times: {error}")
                time.sleep(min(patience_s, pause_s * random.uniform(0.5, 1.0)))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            self._slots.put(connection)

    def _predictions(self, outputs: list[Mapping[str, Floats]]) -> Predictions:
        names = [*self._wanted.features, *([LOGITS] if self._wanted.labels else [])]
        sizes = [*self._wanted.widths.values(), len(self._wanted.label_names)]
        empty = dict(zip(names, [np.empty((0, size), np.float32) for size in sizes], strict=False))
        columns = {name: np.concatenate([empty[name], *(part[name] for part in outputs)]) for name in names}
        features = {name: columns[name] for name in self._wanted.features}
        if not self._wanted.labels:
            return Predictions(features)
        scores = probabilities(columns[LOGITS], multi_label=self._wanted.multi_label)
        return Predictions(features, *top_labels(columns[LOGITS], scores, self._wanted.labels))

    def _mixed_table(
        self, decoded: pa.Table, failed: Mapping[int, Failed], predictions: Predictions, seconds: float
    ) -> pa.Table:
        """Rows in the order of `decoded`, of which those in `failed` have become retryable failures."""
        causes: dict[Failed, list[int]] = {}
        for row, cause in failed.items():
            causes.setdefault(cause, []).append(row)
        kept = np.setdiff1d(np.arange(decoded.num_rows), list(failed))
        rest = decoded.take(pa.array(kept))
        tables = [predicted_table(rest, good_rows(rest), predictions, self._wanted, seconds)]
        for cause, rows in causes.items():
            part = decoded.take(pa.array(rows))
            tables.append(
                failed_table(part, np.arange(len(rows)), self._wanted, cause.error, cause.message, retryable=True)
            )
        order = np.argsort(np.concatenate([kept, *causes.values()]), kind="stable")
        return pa.concat_tables(tables).take(pa.array(order))


def connect(info: ModelInfo, wanted: Wanted, dtype: str | None, spec: TritonSpec, connect_s: float) -> Connection:
    """A connection whose model has been checked, its precision too unless `dtype` is None. Raises ServerAway if nobody
    answers within `connect_s`."""
    name = spec.model_name or default_model_name(info)

    def check(config: Mapping[str, Any]) -> ServedModel:
        return check_model(config, info, wanted, name, dtype)

    try:
        return Connection(spec, name, check, connect_s)
    except DeadlineMissed as error:
        # No miss of a request's: whose server does not answer even this waits, as long as for one that is gone.
        raise ServerAway(str(error)) from error


def drop(connection: Connection | None) -> None:
    """Close a connection that is not to be used again."""
    if connection is not None:
        connection.close()


def check_server(info: ModelInfo, wanted: Wanted, spec: TritonSpec, connect_s: float = CONNECT_S) -> ServedModel:
    """What the server computes, before a job starts; its `dtype` belongs into the run's record.

    Raises ClusterError if nobody answers within `connect_s`, SpecError if it is not the model of the run.
    """
    try:
        connection = connect(info, wanted, None, spec, connect_s)
    except (ServerAway, ServerError) as error:
        name = spec.model_name or default_model_name(info)
        raise ClusterError(
            f"--triton-url {spec.url}: no model {name} answers there ({error}). Start the server on a repository made "
            "by `patchstream export-triton`, or correct --triton-url and --triton-model"
        ) from error
    connection.close()
    return connection.model


def served_model(info: ModelInfo, wanted: Wanted, spec: TritonSpec, dtype: str) -> ServedModel:
    """`check_server` for a run in `dtype`, or in whichever is served where that is `auto`. Raises SpecError too where
    the server computes in another."""
    served = check_server(info, wanted, spec)
    if dtype not in {"auto", served.dtype}:
        raise SpecError(
            f"--dtype {dtype}: the server at {spec.url} computes in {served.dtype}; leave out --dtype, or export the "
            f"model again with --dtype {dtype}"
        )
    return served


def probabilities(logits: Floats, *, multi_label: bool) -> Floats:
    """Softmax over the classes (n, L), or a sigmoid for each where a picture may have several or there is only one."""
    if multi_label:
        return np.asarray(1 / (1 + np.exp(-logits.astype(np.float64))), np.float32)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)
