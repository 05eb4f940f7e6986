"""Which rows match a label and a text, in which order; answers are kept, so that turning a page costs nothing."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.report.run import RunDirectory, batches
from pipeline.report.scan import ImageScan, newest

# Row numbers in the smallest unsigned type that holds every one of them.
Rows = NDArray[np.unsignedinteger[Any]]
Order = Literal["row", "best", "worst"]
ORDERS: dict[Order, str] = {"row": "row number", "best": "highest score first", "worst": "lowest score first"}
_KEPT_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True)
class Filter:
    """Rows whose first label is `label` and whose address or first label contains `text`, whatever the case."""

    label: str = ""
    text: str = ""
    order: Order = "row"


class Catalogue:
    """The rows of `images/` to choose from. Safe to use from several threads.

    Addresses are streamed from the parts for each new text instead of being held in memory. The last answer is kept,
    and those before it as far as 128 MiB hold them.
    """

    def __init__(self, run: RunDirectory, scan: ImageScan) -> None:
        self._run = run
        self._scan = scan
        self._code_of = {name: code for code, name in enumerate(scan.names)}
        self._answers: OrderedDict[Filter, Rows] = OrderedDict()
        self._kind = np.min_scalar_type(len(scan.codes))
        self._lock = threading.Lock()

    def rows(self, wanted: Filter) -> Rows:
        """Every row that matches, in order."""
        with self._lock:
            if wanted in self._answers:
                self._answers.move_to_end(wanted)
                return self._answers[wanted]
        found = self._sort(self._match(wanted), wanted.order).astype(self._kind)
        with self._lock:
            self._answers[wanted] = found
            while len(self._answers) > 1 and sum(answer.nbytes for answer in self._answers.values()) > _KEPT_BYTES:
                self._answers.popitem(last=False)
        return found

    def _match(self, wanted: Filter) -> NDArray[np.int64]:
        codes = self._scan.codes
        if wanted.label:
            code = self._code_of.get(wanted.label)
            rows = np.flatnonzero(codes == code) if code is not None else np.empty(0, np.int64)
        else:
            rows = self._scan.rows
        if not wanted.text or not len(rows):
            return rows
        matching = np.zeros(len(codes), bool)
        folded = wanted.text.casefold()
        named = [code for name, code in self._code_of.items() if folded in name.casefold()]
        matching[np.isin(codes, named)] = True

        def look() -> None:
            for batch in batches(self._run.fs, self._run.parts("images"), ["row", "uri"]):
                hit = pc.fill_null(pc.match_substring(batch.column("uri"), wanted.text, ignore_case=True), False)
                found = batch.column("row").filter(hit).to_numpy()
                matching[found[found < len(matching)]] = True  # an update may add rows while this is served

        self._run.whole_pass(look)
        return rows[matching[rows]]

    def _sort(self, rows: NDArray[np.int64], order: Order) -> NDArray[np.int64]:
        if order == "row":
            return rows
        scores = np.nan_to_num(self._scan.scores[rows], nan=-np.inf if order == "best" else np.inf)
        return rows[np.argsort(-scores if order == "best" else scores, kind="stable")]


def failures_between(
    run: RunDirectory, replaced: NDArray[np.int64], start: int, stop: int
) -> tuple[list[dict[str, object]], int]:
    """Failures number `start` to `stop` in the order of the parts, and how many there are; none of `replaced`."""
    return run.whole_pass(lambda: _failures_between(run, replaced, start, stop))


def _failures_between(
    run: RunDirectory, replaced: NDArray[np.int64], start: int, stop: int
) -> tuple[list[dict[str, object]], int]:
    found: list[pa.RecordBatch] = []
    position = 0
    columns = ["row", "uri", "stage", "error", "message", "retryable"]
    for whole in batches(run.fs, run.parts("failures"), columns):
        batch = newest(whole, replaced)
        low, high = max(start - position, 0), min(stop - position, len(batch))
        if low < high:
            found.append(batch.slice(low, high - low))
        position += len(batch)
    return [record for batch in found for record in batch.to_pylist()], position
