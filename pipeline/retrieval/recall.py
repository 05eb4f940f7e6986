"""How good and how fast an index is: recall@10 against exact search, and the time for a query.

A row found counts if it scores as high as the tenth of the exact search, whichever row that is: of a hundred copies of
a picture any ten are as near.
"""

import time
from typing import TypedDict

import numpy as np

from pipeline.retrieval.arrays import Floats, Ints
from pipeline.retrieval.index import Index, find
from pipeline.retrieval.matrix import Matrix
from pipeline.retrieval.nearest import top_k

K = 10
_TARGET = 0.97
_QUERIES = 200
# The rows that an index was tuned by are not those that it is judged by.
_JUDGED, _TUNED = 0, 1
_MOST_PROBED = 4096
# An index and the exact search may round one score differently: by less than this share of a row's score with itself.
_ROUNDING = 1e-5


class Evaluation(TypedDict):
    """`recall_at_10` over `queries` rows of the run, each searched by itself; milliseconds for a query are medians."""

    queries: int
    recall_at_10: float
    ms_a_query: float
    exact_ms_a_query: float
    search: dict[str, int]


def evaluate(index: Index, matrix: Matrix, *, queries: int = _QUERIES) -> Evaluation:
    """Search `queries` random rows by index and exactly. The row itself, which both find, does not count."""
    chosen, truth = _truth(index, matrix, queries, _JUDGED)
    wanted = index.prepare.apply(matrix.take(chosen))
    seconds = []
    for query in wanted:
        start = time.perf_counter()
        find(index, matrix, query[None], K + 1)
        seconds.append(time.perf_counter() - start)
    exact_seconds = []
    for query in wanted[:5]:
        start = time.perf_counter()
        top_k(matrix, query[None], K + 1, prepare=index.prepare)
        exact_seconds.append(time.perf_counter() - start)
    return Evaluation(
        queries=len(chosen),
        recall_at_10=_recall(index, matrix, chosen, truth),
        ms_a_query=1000 * float(np.median(seconds)),
        exact_ms_a_query=1000 * float(np.median(exact_seconds)),
        search=dict(index.record.search),
    )


def tune(index: Index, matrix: Matrix) -> Index:
    """The index with its search parameter doubled until recall@10 on 200 random rows reaches 0.97."""
    if index.record.kind == "flat":
        return Index(index.faiss, index.record.model_copy(update={"recall_at_10": 1.0}))
    chosen, truth = _truth(index, matrix, _QUERIES, _TUNED)
    key, value = next(iter(index.record.search.items()))
    most = min(_MOST_PROBED, index.record.lists or _MOST_PROBED)
    while True:
        value = min(value, most)
        tried = Index(index.faiss, index.record.model_copy(update={"search": {key: value}}))
        recall = _recall(tried, matrix, chosen, truth)
        if recall >= _TARGET or value >= most:
            return Index(index.faiss, tried.record.model_copy(update={"recall_at_10": round(recall, 4)}))
        value *= 2


def _truth(index: Index, matrix: Matrix, queries: int, seed: int) -> tuple[Ints, list[Floats]]:
    """Positions of random rows, and for each the scores that the exact search finds besides its own, best first."""
    usable = np.flatnonzero(matrix.usable)
    chosen = np.sort(np.random.default_rng(seed).choice(usable, min(queries, len(usable)), replace=False))
    wanted = index.prepare.apply(matrix.take(chosen))
    scores, positions = top_k(matrix, wanted, K + 1, prepare=index.prepare, release=True)
    return chosen, _without(chosen, scores, positions)


def _without(chosen: Ints, scores: Floats, positions: Ints) -> list[Floats]:
    """The K best of `scores` (Q, K + 1) that are not the queries' own; slots of an index that are not filled go too."""
    others = (positions != chosen[:, None]) & (positions >= 0)
    return [row[other][:K] for row, other in zip(scores, others, strict=True)]


def _recall(index: Index, matrix: Matrix, chosen: Ints, truth: list[Floats]) -> float:
    wanted = index.prepare.apply(matrix.take(chosen))
    found = _without(chosen, *find(index, matrix, wanted, K + 1))
    rounding = _ROUNDING * np.einsum("ij,ij->i", wanted, wanted)
    # A row alone in its index has nothing to be found besides it, and so nothing was missed.
    shares = [
        np.count_nonzero(approximate >= exact.min() - margin) / len(exact) if len(exact) else 1.0
        for exact, approximate, margin in zip(truth, found, rounding, strict=True)
    ]
    return float(np.mean(shares))
