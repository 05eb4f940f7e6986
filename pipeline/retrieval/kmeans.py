"""k-means: where to start, how to improve on it, and what to do when the vectors do not fit in memory.

The start is greedy k-means++ (Arthur and Vassilvitskii 2007), tried several times on a sample. The best is improved by
swaps (Lattanzi and Sohler 2019), which get two centres out of one cluster and into two, and goes on over all vectors.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.retrieval.arrays import Floats, Ints, Progress, no_progress, unit
from pipeline.retrieval.lloyd import (
    ROUNDS,
    TOLERANCE,
    ArraySource,
    Clustering,
    Source,
    Totals,
    lloyd,
    score_slices,
    totals,
)
from schemas.errors import SpecError

if TYPE_CHECKING:
    import torch

RESTARTS = 4
_SAMPLE_ROWS = 32_768
_LAST_TOLERANCE = 1e-5
_MINI_BATCH_ROWS = 16_384
_SWAP_ROUNDS = 30
_SWAP_CANDIDATES = 8
_PATIENCE = 3


def greedy_start(vectors: Floats, k: int, rng: np.random.Generator) -> Floats:
    """k of `vectors` (n, D), each the best of 2 + ln k candidates drawn by squared distance to those so far."""
    import torch

    block = torch.from_numpy(vectors)
    squares = torch.einsum("ij,ij->i", block, block)
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
    squares = torch.einsum("ij,ij->i", block, block)
    first, second, home = _nearest_two(block, torch.from_numpy(centres))
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


def _nearest_two(block: "torch.Tensor", centres: "torch.Tensor") -> tuple[Floats, Floats, Ints]:
    """Squared distance of each vector to its nearest centre and to the next, and the number of the nearest."""
    import torch

    best = np.empty((2, len(block)), np.float32)
    home = np.empty(len(block), np.int64)
    # cdist makes two copies of the vectors, which should be no larger than the scores may be.
    for some in score_slices(len(block), max(len(centres), block.shape[1])):
        partial = torch.cdist(block[some], centres).square_()
        values, numbers = torch.topk(partial, 2, dim=1, largest=False)
        best[:, some], home[some] = values.numpy().T, numbers[:, 0].numpy()
    return best[0], best[1], home


def improved(sample: ArraySource, start: Clustering, rng: np.random.Generator) -> Clustering:
    """`start` after swaps, each followed by passes, until three in a row bring less than 1 in 10,000."""
    best, idle = start, 0
    if len(start.centres) < 2:
        return best
    for _ in range(_SWAP_ROUNDS):
        tried = lloyd(sample, swapped(sample.vectors, best.centres, rng), start.spherical)
        idle = 0 if tried.inertia < (1 - TOLERANCE) * best.inertia else idle + 1
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
    rounds = 3 if mini_batch else ROUNDS
    # Centres that come from a sample are nearly right; on many vectors the last hundred-thousandth is not worth a pass.
    tolerance = _LAST_TOLERANCE if whole is sample else TOLERANCE
    return lloyd(whole, centres, spherical, rounds=rounds, tolerance=tolerance, progress=progress)


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
