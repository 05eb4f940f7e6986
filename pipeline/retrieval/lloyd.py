"""Lloyd's k-means (1982), Euclidean or spherical (Dhillon and Modha 2001), over vectors that need not fit in memory.

A pass reads all vectors once, a chunk at a time. What it adds up, `Totals`, can be added up over chunks, parts and
machines alike; sums over chunks are in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.retrieval.arrays import Floats, Ints, Preparation, Progress, no_progress, unit
from pipeline.retrieval.matrix import Matrix
from schemas.errors import SpecError

ROUNDS = 100
TOLERANCE = 1e-4
_SLICE_ROWS = 16_384
_SCORE_BYTES = 64 * 1024 * 1024


class Source(Protocol):
    """Where vectors come from: prepared chunks, again and again, and some rows at random."""

    def __len__(self) -> int: ...

    def chunks(self) -> Iterator[Floats]:
        """All vectors (n, D), in order, a chunk at a time."""

    def sample(self, rows: int, rng: np.random.Generator) -> Floats:
        """`rows` different vectors, or all if there are fewer."""


@dataclass(frozen=True)
class MatrixSource:
    """The usable vectors of a matrix, prepared."""

    matrix: Matrix
    positions: Ints
    prepare: Preparation

    def __len__(self) -> int:
        return len(self.positions)

    def chunks(self) -> Iterator[Floats]:
        """All vectors, in the order of `positions`."""
        for _, vectors in self.matrix.chunks(self.positions, release=True):
            yield self.prepare.apply(vectors) if self.prepare.normalise or self.prepare.mean is not None else vectors

    def sample(self, rows: int, rng: np.random.Generator) -> Floats:
        """Different vectors at random."""
        chosen = np.sort(rng.choice(self.positions, min(rows, len(self)), replace=False))
        return self.prepare.apply(self.matrix.take(chosen))


@dataclass(frozen=True)
class ArraySource:
    """Vectors (n, D) in memory, prepared already."""

    vectors: Floats

    def __len__(self) -> int:
        return len(self.vectors)

    def chunks(self) -> Iterator[Floats]:
        """Slices of 16,384 vectors."""
        for start in range(0, len(self), _SLICE_ROWS):
            yield self.vectors[start : start + _SLICE_ROWS]

    def sample(self, rows: int, rng: np.random.Generator) -> Floats:
        """Different vectors at random."""
        return self.vectors[rng.choice(len(self), min(rows, len(self)), replace=False)]


@dataclass(frozen=True)
class Totals:
    """What a pass adds up for each of k centres: vectors `sums` (k, D), `counts` (k,), squared distances `inertia`.

    `farthest` (D,) is the vector farthest from its centre, at squared distance `reach`: where an empty cluster
    starts anew.
    """

    sums: NDArray[np.float64]
    counts: Ints
    inertia: float
    farthest: Floats
    reach: float

    @property
    def starved(self) -> bool:
        """Whether a cluster is empty while some vector stands away from its centre, so that it could fill it."""
        return self.reach > 0 and bool((self.counts == 0).any())


@dataclass(frozen=True)
class Clustering:
    """`centres` (k, D); `inertia`, the sum of squared distances to the nearest; `rounds` over all vectors."""

    centres: Floats
    inertia: float
    rounds: int
    spherical: bool


def score_slices(rows: int, k: int) -> Iterator[slice]:
    """Slices of `rows` vectors, in order, whose float32 scores for k centres take about 64 MiB."""
    step = max(1, _SCORE_BYTES // (4 * k))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def assign(vectors: Floats, centres: Floats) -> tuple[Ints, Floats]:
    """Number of the nearest of `centres` (k, D) for each of `vectors` (n, D), and the squared distance to it."""
    import torch

    block, weights = torch.from_numpy(vectors), torch.from_numpy(centres)
    squares = (weights * weights).sum(1)
    numbers, distances = np.empty(len(vectors), np.int64), np.empty(len(vectors), np.float32)
    for some in score_slices(len(vectors), len(centres)):
        # |x − c|² = |x|² − 2x·c + |c|²; the first does not change which centre is nearest.
        partial = torch.addmm(squares, block[some], weights.T, alpha=-2)
        nearest, found = partial.min(dim=1)
        numbers[some] = found.numpy()
        distances[some] = (nearest + (block[some] * block[some]).sum(1)).clamp_(min=0).numpy()
    return numbers, distances


def totals(vectors: Floats, centres: Floats) -> Totals:
    """What one chunk adds to a pass."""
    from scipy.sparse import csr_array

    numbers, distances = assign(vectors, centres)
    counts = np.bincount(numbers, minlength=len(centres))
    # Row j of this matrix has a one for each member of cluster j.
    members = csr_array(
        (
            np.ones(len(numbers), np.float32),
            np.argsort(numbers, kind="stable"),
            np.concatenate([[0], np.cumsum(counts)]),
        ),
        shape=(len(centres), len(numbers)),
    )
    sums = (members @ vectors).astype(np.float64)
    far = int(distances.argmax())
    return Totals(sums, counts, float(distances.sum(dtype=np.float64)), vectors[far].copy(), float(distances[far]))


def add(one: Totals | None, other: Totals) -> Totals:
    """Both together."""
    if one is None:
        return other
    far = max(one, other, key=lambda each: each.reach)
    return Totals(
        one.sums + other.sums, one.counts + other.counts, one.inertia + other.inertia, far.farthest, far.reach
    )


def moved(centres: Floats, found: Totals, spherical: bool) -> Floats:
    """Centres (k, D) at the means of their members. The first cluster without members moves to the farthest vector."""
    fresh = np.where(found.counts[:, None] > 0, found.sums / np.maximum(1, found.counts)[:, None], centres)
    empty = np.flatnonzero(found.counts == 0)
    if len(empty):
        fresh[empty[0]] = found.farthest
    fresh = fresh.astype(np.float32)
    return unit(fresh) if spherical else fresh


def lloyd(
    source: Source,
    centres: Floats,
    spherical: bool,
    *,
    rounds: int = ROUNDS,
    tolerance: float = TOLERANCE,
    progress: Progress = no_progress,
) -> Clustering:
    """Passes over all vectors until the inertia falls by less than `tolerance` of it in two passes together.

    Raises SpecError where there is no vector.
    """
    history: list[float] = []
    while True:
        found: Totals | None = None
        for vectors in source.chunks():
            found = add(found, totals(vectors, centres))
        if found is None:
            raise SpecError("nothing to cluster: no row has a usable vector")
        history.append(found.inertia)
        progress("k-means passes", len(history), rounds)
        settled = len(history) > 2 and history[-3] - history[-1] <= tolerance * history[-3]
        # Whoever moves the centres measures them again: the inertia is that of the centres given back.
        if (settled and not found.starved) or len(history) == rounds:
            return Clustering(centres, history[-1], len(history), spherical)
        centres = moved(centres, found, spherical)
