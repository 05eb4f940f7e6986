"""How good and how fast an index is: recall@10 against exact search, and the time for a query."""

import time
from typing import TypedDict

import numpy as np

from pipeline.retrieval.arrays import Ints
from pipeline.retrieval.index import Index, find
from pipeline.retrieval.matrix import Matrix
from pipeline.retrieval.nearest import top_k

K = 10
TARGET = 0.97
_QUERIES = 200
_MOST_PROBED = 4096


class Evaluation(TypedDict):
    """`recall_at_10` over `queries` rows of the run, each searched by itself; milliseconds for a query are medians."""

    queries: int
    recall_at_10: float
    ms_a_query: float
    exact_ms_a_query: float
    search: dict[str, int]


def evaluate(index: Index, matrix: Matrix, *, queries: int = _QUERIES, seed: int = 0) -> Evaluation:
    """Search `queries` random rows by index and exactly. The row itself, which both find, does not count."""
    chosen, truth = _truth(index, matrix, queries, seed)
    wanted = index.prepare.apply(matrix.take(chosen))
    seconds = []
    for query in wanted:
        start = time.perf_counter()
        find(index, matrix, query[None], K + 1)
        seconds.append(time.perf_counter() - start)
    exact = []
    for query in wanted[:5]:
        start = time.perf_counter()
        top_k(matrix, query[None], K + 1, prepare=index.prepare)
        exact.append(time.perf_counter() - start)
    return Evaluation(
        queries=len(chosen),
        recall_at_10=_recall(index, matrix, chosen, truth),
        ms_a_query=1000 * float(np.median(seconds)),
        exact_ms_a_query=1000 * float(np.median(exact)),
        search=dict(index.record.search),
    )


def tune(index: Index, matrix: Matrix, *, target: float = TARGET, seed: int = 1) -> Index:
    """The index with its search parameter doubled until recall@10 on 200 random rows reaches `target`."""
    if index.record.kind == "flat":
        return Index(index.faiss, index.record.model_copy(update={"recall_at_10": 1.0}))
    chosen, truth = _truth(index, matrix, _QUERIES, seed)
    key, value = next(iter(index.record.search.items()))
    most = min(_MOST_PROBED, index.record.lists or _MOST_PROBED)
    while True:
        value = min(value, most)
        tried = Index(index.faiss, index.record.model_copy(update={"search": {key: value}}))
        recall = _recall(tried, matrix, chosen, truth)
        if recall >= target or value >= most:
            return Index(index.faiss, tried.record.model_copy(update={"recall_at_10": round(recall, 4)}))
        value *= 2


def _truth(index: Index, matrix: Matrix, queries: int, seed: int) -> tuple[Ints, Ints]:
    usable = np.flatnonzero(matrix.usable)
    chosen = np.sort(np.random.default_rng(seed).choice(usable, min(queries, len(usable)), replace=False))
    _, positions = top_k(matrix, index.prepare.apply(matrix.take(chosen)), K + 1, prepare=index.prepare, release=True)
    return chosen, positions


def _recall(index: Index, matrix: Matrix, chosen: Ints, truth: Ints) -> float:
    _, found = find(index, matrix, index.prepare.apply(matrix.take(chosen)), K + 1)
    shares = []
    for position, exact, approximate in zip(chosen, truth, found, strict=True):
        neighbours = set(exact[exact != position][:K].tolist())
        shares.append(len(neighbours & set(approximate.tolist())) / max(1, len(neighbours)))
    return float(np.mean(shares))
