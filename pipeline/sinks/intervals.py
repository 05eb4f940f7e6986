"""Sets of rows as sorted, disjoint ranges: an (n, 2) int64 array of [start, stop).

A finished run of a billion rows is one range, so memory goes with the number of gaps, not of rows.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Spans = npt.NDArray[np.int64]

EMPTY: Spans = np.empty((0, 2), np.int64)


def from_rows(rows: npt.NDArray[np.int64]) -> Spans:
    """Ranges that cover `rows` (any order). A row given twice is covered twice."""
    ordered = np.sort(rows)
    if not len(ordered):
        return EMPTY
    breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
    starts = ordered[np.concatenate([[0], breaks])]
    stops = ordered[np.concatenate([breaks - 1, [len(ordered) - 1]])] + 1
    return np.stack([starts, stops], axis=1)


def union(parts: Iterable[Spans]) -> Spans:
    """Ranges of all rows that lie in any of `parts`."""
    merged, _ = _sweep(parts)
    return merged


def overlap(parts: Iterable[Spans]) -> Spans:
    """Ranges of the rows that are covered more than once."""
    _, twice = _sweep(parts)
    return twice


def common(one: Spans, other: Spans) -> Spans:
    """Ranges of the rows that both cover."""
    return overlap([union([one]), union([other])])


def complement(spans: Spans, first: int, stop: int) -> Spans:
    """What [first, stop) holds beyond `spans`, which are disjoint and sorted."""
    inside = intersect(spans, first, stop)
    edges = np.concatenate([[first], inside.reshape(-1), [stop]]).reshape(-1, 2)
    return edges[edges[:, 0] < edges[:, 1]]


def intersect(spans: Spans, first: int, stop: int) -> Spans:
    """The part of `spans` within [first, stop)."""
    clipped = np.clip(spans, first, stop)
    return clipped[clipped[:, 0] < clipped[:, 1]]


def count(spans: Spans) -> int:
    """How many rows disjoint `spans` cover."""
    return int((spans[:, 1] - spans[:, 0]).sum())


def contains(spans: Spans, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """For each of `rows`, whether disjoint, sorted `spans` cover it."""
    if not len(spans):
        return np.zeros(len(rows), bool)
    at = np.searchsorted(spans[:, 0], rows, side="right") - 1
    covered: npt.NDArray[np.bool_] = (at >= 0) & (rows < spans[np.maximum(at, 0), 1])
    return covered


def _sweep(parts: Iterable[Spans]) -> tuple[Spans, Spans]:
    """Depth of coverage along the rows: ranges of depth ≥ 1, and ranges of depth ≥ 2."""
    stacked = [part for part in parts if len(part)]
    if not stacked:
        return EMPTY, EMPTY
    spans = np.concatenate(stacked)
    edges = np.concatenate([spans[:, 0], spans[:, 1]])
    steps = np.concatenate([np.ones(len(spans), np.int64), -np.ones(len(spans), np.int64)])
    order = np.argsort(edges, kind="stable")
    places, first = np.unique(edges[order], return_index=True)
    depth = np.cumsum(np.add.reduceat(steps[order], first))
    return _where(places, depth >= 1), _where(places, depth >= 2)


def _where(places: npt.NDArray[np.int64], covered: npt.NDArray[np.bool_]) -> Spans:
    padded = np.concatenate([[False], covered])
    flips = np.flatnonzero(padded[1:] != padded[:-1])
    return places[flips].reshape(-1, 2)
