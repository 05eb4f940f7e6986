"""k-means, Euclidean (Lloyd 1982) or spherical (Dhillon and Modha 2001), over a matrix that need not fit in memory.

The start is greedy k-means++ (Arthur and Vassilvitskii 2007), tried several times on a sample. The best is improved by
swaps (Lattanzi and Sohler 2019), which get two centres out of one cluster and into two, and goes on over all vectors.
A pass reads the matrix once, a chunk at a time, and sums in float64, so its result does not depend on the chunks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.retrieval.arrays import Floats, Ints, Preparation, Progress, no_progress, unit
from pipeline.retrieval.matrix import Matrix
from schemas.errors import SpecError

if TYPE_CHECKING:
    import torch

RESTARTS = 4
_SAMPLE_ROWS = 32_768
_ROUNDS = 100
_TOLERANCE = 1e-4
_LAST_TOLERANCE = 1e-5
_MINI_BATCH_ROWS = 16_384
_SWAP_ROUNDS = 30
_SWAP_CANDIDATES = 8
_PATIENCE = 3


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
        for start in range(0, len(self), _MINI_BATCH_ROWS):
            yield self.vectors[start : start + _MINI_BATCH_ROWS]

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


@dataclass(frozen=True)
class Clustering:
    """`centres` (k, D); `inertia`, the sum of squared distances to the nearest; `rounds` over all vectors."""

    centres: Floats
    inertia: float
    rounds: int
    spherical: bool


def assign(vectors: Floats, centres: Floats) -> tuple[Ints, Floats]:
    """Number of the nearest of `centres` (k, D) for each of `vectors` (n, D), and the squared distance to it."""
    import torch

    block, weights = torch.from_numpy(vectors), torch.from_numpy(centres)
    # |x − c|² = |x|² − 2x·c + |c|²; the first does not change which centre is nearest.
    partial = torch.addmm((weights * weights).sum(1), block, weights.T, alpha=-2)
    nearest, numbers = partial.min(dim=1)
    distances = (nearest + (block * block).sum(1)).clamp_(min=0)
    return numbers.numpy(), distances.numpy()


def totals(vectors: Floats, centres: Floats) -> Totals:
    """What one chunk adds to a pass."""
    numbers, distances = assign(vectors, centres)
    counts = np.bincount(numbers, minlength=len(centres))
    order = np.argsort(numbers, kind="stable")
    sums = np.zeros(centres.shape)
    filled = np.flatnonzero(counts)
    if len(filled):
        starts = (np.cumsum(counts) - counts)[filled]
        sums[filled] = np.add.reduceat(vectors[order], starts, axis=0, dtype=np.float64)
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
    rounds: int = _ROUNDS,
    tolerance: float = _TOLERANCE,
    progress: Progress = no_progress,
) -> Clustering:
    """Passes over all vectors until the inertia falls by less than `tolerance` of it in two passes together."""
    history: list[float] = []
    for done in range(rounds):
        found: Totals | None = None
        for vectors in source.chunks():
            found = add(found, totals(vectors, centres))
        if found is None:
            raise SpecError("nothing to cluster: no row has a usable vector")
        history.append(found.inertia)
        progress("k-means passes", done + 1, rounds)
        settled = len(history) > 2 and history[-3] - history[-1] <= tolerance * history[-3]
        starved = found.reach > 0 and (found.counts == 0).any()
        if settled and not starved:
            break
        centres = moved(centres, found, spherical)
    return Clustering(centres, history[-1], len(history), spherical)


def greedy_start(vectors: Floats, k: int, rng: np.random.Generator) -> Floats:
    """k of `vectors` (n, D), each the best of 2 + ln k candidates drawn by squared distance to those so far."""
    import torch

    block = torch.from_numpy(vectors)
    squares = (block * block).sum(1)
    chosen = [int(rng.integers(len(vectors)))]
    nearest = _distances(block, squares, chosen)[:, 0]
    for _ in range(1, k):
        weights = np.cumsum(nearest, dtype=np.float64)
        if weights[-1] <= 0:
            chosen.append(int(rng.integers(len(vectors))))
            continue
        draws = rng.random(2 + int(np.log(k))) * weights[-1]
        candidates = np.minimum(np.searchsorted(weights, draws), len(vectors) - 1)
        left = np.minimum(_distances(block, squares, candidates.tolist()), nearest[:, None])
        best = int(left.sum(axis=0, dtype=np.float64).argmin())
        chosen.append(int(candidates[best]))
        nearest = left[:, best]
    return vectors[chosen]


def swapped(vectors: Floats, centres: Floats, rng: np.random.Generator) -> Floats:
    """Centres with the best improving swap made: one taken away, one put where a vector far from all stands.

    The centres come back as they are if none of 8 candidates improves on them.
    """
    import torch

    block = torch.from_numpy(vectors)
    squares = (block * block).sum(1)
    partial = torch.cdist(block, torch.from_numpy(centres)).square_()
    values, numbers = torch.topk(partial, 2, dim=1, largest=False)
    (first, second), home = values.numpy().T, numbers[:, 0].numpy()
    weights = np.cumsum(first, dtype=np.float64)
    if weights[-1] <= 0:
        return centres
    drawn = np.searchsorted(weights, rng.random(_SWAP_CANDIDATES) * weights[-1])
    candidates = np.minimum(drawn, len(vectors) - 1)
    away = _distances(block, squares, candidates.tolist())  # (n, candidates)
    best, cost = (0, 0), float(weights[-1])
    for number, distance in enumerate(away.T):
        with_it = np.minimum(first, distance)
        # Taking centre j away sends its members to their second nearest or to the candidate, whichever is nearer.
        lost = np.bincount(home, np.minimum(second, distance) - with_it, minlength=len(centres))
        without = int(lost.argmin())
        after = float(with_it.sum(dtype=np.float64) + lost[without])
        if after < cost:
            best, cost = (number, without), after
    if cost >= weights[-1]:
        return centres
    fresh = centres.copy()
    fresh[best[1]] = vectors[candidates[best[0]]]
    return fresh


def improved(sample: ArraySource, start: Clustering, rng: np.random.Generator) -> Clustering:
    """`start` after swaps, each followed by passes, until three in a row bring less than 1 in 10,000."""
    best, idle = start, 0
    if len(start.centres) < 2:
        return best
    for _ in range(_SWAP_ROUNDS):
        tried = lloyd(sample, swapped(sample.vectors, best.centres, rng), start.spherical)
        idle = 0 if tried.inertia < (1 - _TOLERANCE) * best.inertia else idle + 1
        best = min(best, tried, key=lambda clustering: clustering.inertia)
        if idle == _PATIENCE:
            break
    return best


def _distances(block: "torch.Tensor", squares: "torch.Tensor", chosen: list[int]) -> Floats:
    import torch

    partial = torch.addmm(squares[chosen][None], block, block[chosen].T, alpha=-2) + squares[:, None]
    distances: Floats = partial.clamp_(min=0).numpy()
    return distances


def fit(
    source: Source,
    k: int,
    *,
    spherical: bool,
    seed: int = 0,
    restarts: int = RESTARTS,
    mini_batch: bool = False,
    progress: Progress = no_progress,
) -> Clustering:
    """The best of `restarts` starts, improved by swaps.

    Both look at a sample of 32,768 vectors, which is all if there are no more. With `mini_batch` random batches move
    the centres before the last passes (Sculley 2010), which saves passes where reading is what costs.
    Raises SpecError if k is not between 1 and the number of vectors.
    """
    if not 1 <= k <= len(source):
        raise SpecError(f"-k {k}: there are {len(source)} usable vectors; k is between 1 and {len(source)}")
    rng = np.random.default_rng(seed)
    sample = ArraySource(source.sample(max(_SAMPLE_ROWS, 64 * k), rng))
    tried: list[Clustering] = []
    for number in range(restarts):
        tried.append(lloyd(sample, greedy_start(sample.vectors, k, rng), spherical))
        progress("k-means starts", number + 1, restarts)
    best = improved(sample, min(tried, key=lambda clustering: clustering.inertia), rng)
    whole = sample if len(sample) == len(source) else source
    centres = _mini_batches(source, best.centres, spherical, rng) if mini_batch else best.centres
    rounds = 3 if mini_batch else _ROUNDS
    return lloyd(whole, centres, spherical, rounds=rounds, tolerance=_LAST_TOLERANCE, progress=progress)


def _mini_batches(source: Source, centres: Floats, spherical: bool, rng: np.random.Generator) -> Floats:
    """Sculley's web-scale k-means: each centre moves to the running mean of the members it has seen."""
    seen = np.zeros(len(centres))
    for _ in range(max(10, min(100, len(source) // _MINI_BATCH_ROWS))):
        centres = running_mean(centres, totals(source.sample(_MINI_BATCH_ROWS, rng), centres), seen, spherical)
    return centres


def running_mean(centres: Floats, found: Totals, seen: NDArray[np.float64], spherical: bool) -> Floats:
    """Centres after one more batch; `seen` (k,), how many members each has had, is added to."""
    seen += found.counts
    share = np.where(found.counts > 0, found.counts / np.maximum(1, seen), 0.0)[:, None]
    means = found.sums / np.maximum(1, found.counts)[:, None]
    mixed = ((1 - share) * centres + share * means).astype(np.float32)
    return unit(mixed) if spherical else mixed
