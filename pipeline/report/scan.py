"""One pass over `images/` and one over `failures/`: counts, histograms, and the label of every row.

Only narrow columns are read, never features. Eight bytes are kept for each row, so that a million rows cost 8 MB.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.report.run import RunDirectory, batches
from schemas.errors import OutputError

ABSENT, NO_LABEL = -2, -1
_MAX_SIDE = 65_535
_EXAMPLES = 3


@dataclass
class ImageScan:
    """What is known of the rows of `images/`.

    `codes[row]` is an index into `names`, `NO_LABEL`, or `ABSENT` where the row is no image (yet). `scores[row]` is the
    score of its first label. `sides[n]` counts the images whose longer side has n pixels. Rows of older versions of an
    object are left out of everything; `replaced` are their numbers, ascending, wherever they still stand.
    """

    codes: NDArray[np.int32]
    scores: NDArray[np.float32]
    replaced: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    names: list[str] = field(default_factory=list)
    sides: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_MAX_SIDE + 1, np.int64))
    shapes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    images: int = 0

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows that are images, ascending."""
        return np.flatnonzero(self.codes != ABSENT)

    def holds(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `rows` are images."""
        inside = (rows >= 0) & (rows < len(self.codes))
        held: NDArray[np.bool_] = inside & (self.codes[np.where(inside, rows, 0)] != ABSENT)
        return held

    def label(self, row: int) -> str | None:
        """The first label of `row`."""
        code = int(self.codes[row]) if row < len(self.codes) else ABSENT
        return self.names[code] if code >= 0 else None

    def label_counts(self) -> list[tuple[str, int]]:
        """Images by first label, most frequent first."""
        counts = np.bincount(self.codes[self.codes >= 0], minlength=len(self.names))
        order = np.argsort(-counts, kind="stable")
        return [(self.names[code], int(counts[code])) for code in order if counts[code]]


def first_labels(column: pa.Array) -> tuple[NDArray[np.bool_], pa.Array, NDArray[np.float32]]:
    """Which rows of a `labels` column have a label, and the text and score of each one's first.

    A checkpoint without names for its classes gives the index as text.
    """
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    has = lengths > 0
    best = column.values.take(pa.array(column.offsets.to_numpy()[:-1][has]))
    text = pc.coalesce(best.field("label"), best.field("index").cast(pa.string()))
    return has, text, best.field("score").to_numpy(zero_copy_only=False)


def scan_images(run: RunDirectory) -> ImageScan:
    """Read the narrow columns of `images/`. Raises OutputError for a row number below zero."""
    size = run.record.manifest_rows
    scan = ImageScan(np.full(size, ABSENT, np.int32), np.full(size, np.nan, np.float32), _replaced_rows(run))
    code_of: dict[str, int] = {}
    for found in batches(run.fs, run.parts("images"), ["row", "labels", "width", "height", "format"]):
        batch = newest(found, scan.replaced)
        rows = batch.column("row").to_numpy()
        if not len(rows):
            continue
        _grow(scan, rows)
        scan.codes[rows] = NO_LABEL
        if "labels" in batch.schema.names:
            _add_labels(scan, code_of, rows, batch.column("labels"))
        _add_facts(scan, batch)
        scan.images += len(rows)
    scan.names = list(code_of)
    return scan


def _replaced_rows(run: RunDirectory) -> NDArray[np.int64]:
    """Rows that newer versions of the same objects replace, ascending."""
    found = [np.empty(0, np.int64)]
    for batch in batches(run.fs, run.parts("manifest"), ["replaces"]):
        if "replaces" not in batch.schema.names:
            break
        found.append(pc.drop_null(batch.column("replaces")).to_numpy())
    return np.unique(np.concatenate(found))


def newest(batch: pa.RecordBatch, replaced: NDArray[np.int64]) -> pa.RecordBatch:
    """`batch` without the rows of older versions."""
    if not len(replaced):
        return batch
    rows = batch.column("row").to_numpy()
    nearest = replaced[np.minimum(np.searchsorted(replaced, rows), len(replaced) - 1)]
    return batch.filter(pa.array(nearest != rows))


def _grow(scan: ImageScan, rows: NDArray[np.int64]) -> None:
    low, high = int(rows.min()), int(rows.max())
    if low < 0:
        raise OutputError(
            f"images/ holds row {low}; rows count from 0. `patchstream verify` says which part is damaged."
        )
    if high >= len(scan.codes):
        more = max(high + 1, len(scan.codes) * 3 // 2) - len(scan.codes)
        scan.codes = np.concatenate([scan.codes, np.full(more, ABSENT, np.int32)])
        scan.scores = np.concatenate([scan.scores, np.full(more, np.nan, np.float32)])


def _add_labels(scan: ImageScan, code_of: dict[str, int], rows: NDArray[np.int64], column: pa.Array) -> None:
    has, text, score = first_labels(column)
    encoded = text.dictionary_encode()
    codes = np.array([code_of.setdefault(name, len(code_of)) for name in encoded.dictionary.to_pylist()], np.int32)
    if len(codes):
        scan.codes[rows[has]] = codes[encoded.indices.to_numpy()]
        scan.scores[rows[has]] = score


def _add_facts(scan: ImageScan, batch: pa.RecordBatch) -> None:
    if not {"width", "height", "format"} <= set(batch.schema.names):
        return
    width, height = (pc.fill_null(batch.column(name), 0).to_numpy() for name in ("width", "height"))
    scan.sides += np.bincount(np.minimum(np.maximum(width, height), _MAX_SIDE), minlength=_MAX_SIDE + 1)
    scan.shapes["landscape"] += int(np.count_nonzero(width > height))
    scan.shapes["portrait"] += int(np.count_nonzero(width < height))
    scan.shapes["square"] += int(np.count_nonzero(width == height))
    for item in pc.value_counts(batch.column("format")).to_pylist():
        scan.formats[item["values"] or "unknown"] += item["counts"]


@dataclass
class Cause:
    """Failures of one kind. `examples` are (row, uri, message)."""

    stage: str
    error: str
    count: int = 0
    retryable: int = 0
    examples: list[tuple[int, str, str]] = field(default_factory=list)


def scan_failures(run: RunDirectory, replaced: NDArray[np.int64]) -> list[Cause]:
    """Group `failures/` by stage and error, most frequent first, with a few examples of each; none of `replaced`."""
    causes: dict[tuple[str, str], Cause] = {}
    columns = ["row", "uri", "stage", "error", "message", "retryable"]
    for found in batches(run.fs, run.parts("failures"), columns):
        batch = newest(found, replaced)
        groups = pa.table(batch).group_by(["stage", "error"]).aggregate([("row", "count"), ("retryable", "sum")])
        for group in groups.to_pylist():
            key = (group["stage"] or "", group["error"] or "")
            cause = causes.setdefault(key, Cause(*key))
            cause.count += group["row_count"]
            cause.retryable += group["retryable_sum"] or 0
            if len(cause.examples) < _EXAMPLES:
                _add_examples(cause, batch, group)
    return sorted(causes.values(), key=lambda cause: (-cause.count, cause.stage, cause.error))


def _add_examples(cause: Cause, batch: pa.RecordBatch, group: dict[str, str]) -> None:
    same = pc.and_(pc.equal(batch.column("stage"), group["stage"]), pc.equal(batch.column("error"), group["error"]))
    found = batch.filter(same).slice(0, _EXAMPLES - len(cause.examples)).to_pylist()
    cause.examples += [(item["row"], item["uri"], item["message"] or "") for item in found]
