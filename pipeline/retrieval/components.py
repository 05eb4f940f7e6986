"""Connected components over a stream of edges, in memory that depends on the number of nodes only."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.retrieval.arrays import Ints

_BUFFERED_EDGES = 4_000_000


class Components:
    """`count` nodes, each a component of its own until edges join them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._labels = np.arange(count)
        self._edges: list[tuple[Ints, Ints]] = []
        self._buffered = 0

    def join(self, first: Ints, second: Ints) -> None:
        """Edges between `first[i]` and `second[i]`."""
        self._edges.append((self._labels[first], self._labels[second]))
        self._buffered += len(first)
        if self._buffered > _BUFFERED_EDGES:
            self._contract()

    def labels(self) -> Ints:
        """(count,) the component of each node: equal numbers mean the same component."""
        self._contract()
        return self._labels

    def _contract(self) -> None:
        if not self._buffered:
            return
        first = np.concatenate([edge[0] for edge in self._edges])
        second = np.concatenate([edge[1] for edge in self._edges])
        graph = coo_array((np.ones(len(first), np.bool_), (first, second)), shape=(self._count, self._count))
        _, joined = connected_components(graph, directed=False)
        self._labels = joined[self._labels].astype(np.int64)
        self._edges, self._buffered = [], 0
