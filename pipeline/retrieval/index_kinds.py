"""The kinds of faiss index, chosen by size unless one is asked for.

Exact (`flat`) where that takes milliseconds, inverted lists (`ivf-flat`) while the vectors fit in memory,
product-quantised lists (`ivf-pq`) beyond. `hnsw` is there for the asking.
"""

from typing import Any, Literal, get_args

import faiss
import numpy as np

from pipeline.retrieval.arrays import Preparation
from pipeline.retrieval.matrix import Matrix
from schemas.errors import SpecError

Kind = Literal["flat", "ivf-flat", "ivf-pq", "hnsw"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_FLAT_ROWS = 20_000
_FLAT_BYTES = 8 * 1024**3
_SAMPLE_PER_LIST = 40
_TRAINING_ROUNDS = 10
_PQ_BITS = 8
_HNSW_LINKS = 32
_SEED = 29


def check_kind(kind: str) -> Kind:
    """Raises SpecError unless `kind` is one of ours."""
    for known in KINDS:
        if kind == known:
            return known
    raise SpecError(f"--kind {kind}: choose one of {', '.join(KINDS)}, or leave it out")


def kind_for(rows: int, dim: int) -> Kind:
    """The kind for so many vectors."""
    if rows <= _FLAT_ROWS:
        return "flat"
    return "ivf-flat" if 4 * rows * dim <= _FLAT_BYTES else "ivf-pq"


def new_index(kind: Kind, dim: int, rows: int) -> tuple[Any, int | None]:
    """An empty, untrained index for inner products, and its number of lists, None where it has none.

    Raises SpecError for too few rows to learn the codes of `ivf-pq`.
    """
    if kind == "flat":
        return faiss.IndexIDMap2(faiss.IndexFlatIP(dim)), None
    if kind == "hnsw":
        return faiss.IndexIDMap2(faiss.IndexHNSWFlat(dim, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)), None
    # About 2√N lists balance the time to find the lists with the time to look through them.
    lists = int(np.clip(2 * np.sqrt(rows), 1, max(1, rows // _SAMPLE_PER_LIST)))
    coarse: Any = faiss.IndexFlatIP(dim)
    index: Any
    if kind == "ivf-flat":
        index = faiss.IndexIVFFlat(coarse, dim, lists, faiss.METRIC_INNER_PRODUCT)
    else:
        if rows < 2**_PQ_BITS:
            raise SpecError(f"--kind ivf-pq: needs at least {2**_PQ_BITS} vectors to learn its codes; there are {rows}")
        index = faiss.IndexIVFPQ(coarse, dim, lists, _sub_vectors(dim), _PQ_BITS, faiss.METRIC_INNER_PRODUCT)
    coarse.this.disown()
    index.own_fields = True
    index.cp.spherical = True
    index.cp.niter = _TRAINING_ROUNDS
    index.cp.seed = _SEED
    index.cp.max_points_per_centroid = _SAMPLE_PER_LIST
    return index, lists


def _sub_vectors(dim: int) -> int:
    """Codes a vector: about one byte for eight numbers; it has to divide the dimension."""
    return max(count for count in range(1, max(2, dim // 8 + 1)) if dim % count == 0)


def train(index: Any, matrix: Matrix, prepare: Preparation, lists: int | None) -> None:
    """Find the lists' centres, and the codes, from a sample."""
    if index.is_trained:
        return
    usable = np.flatnonzero(matrix.usable)
    rows = min(len(usable), max(_SAMPLE_PER_LIST * (lists or 1), 40 * 2**_PQ_BITS))
    sample = np.sort(np.random.default_rng(_SEED).choice(usable, rows, replace=False))
    index.train(prepare.apply(matrix.take(sample)))
