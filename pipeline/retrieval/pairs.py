"""All pairs of vectors whose cosine is at least t, without an N×N table.

Up to `ALL_PAIRS` vectors, every pair is looked at, in blocks. Beyond that vectors are put into about √N lists by
nearest centre, and a vector is compared with the lists of the centres nearest to it: pairs as near as duplicates are
share a list or lie in neighbouring ones. The few that do not are missed; `docs/retrieval.md` says how few.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.retrieval.arrays import Floats, Ints, Preparation, Progress
from pipeline.retrieval.matrix import Matrix

if TYPE_CHECKING:
    import torch

ALL_PAIRS = 40_000
_BLOCK = 2048
_PROBES = 8
_SAMPLE_PER_LIST = 64
_TRAINING_ROUNDS = 8
_SEED = 17
_SORTED_IN = 16


class Pairs(NamedTuple):
    """Positions in the matrix, `first < second`, and their cosine. No pair comes twice."""

    first: Ints
    second: Ints
    score: Floats


def near_pairs(
    matrix: Matrix, positions: Ints, threshold: float, prepare: Preparation, progress: Progress
) -> Iterator[Pairs]:
    """Pairs among `positions` (ascending, usable) with a cosine of at least `threshold`, some at a time."""
    if len(positions) <= ALL_PAIRS:
        return _all_pairs(matrix, positions, threshold, prepare, progress)
    return _listed_pairs(matrix, positions, threshold, prepare, progress)


def _all_pairs(
    matrix: Matrix, positions: Ints, threshold: float, prepare: Preparation, progress: Progress
) -> Iterator[Pairs]:
    import torch

    if not len(positions):
        return
    vectors = torch.from_numpy(prepare.apply(matrix.take(positions)))
    starts = range(0, len(vectors), _BLOCK)
    for start in starts:
        for other in range(start, len(vectors), _BLOCK):
            first, second, scores = _above(vectors[start : start + _BLOCK], vectors[other : other + _BLOCK], threshold)
            first, second = first + start, second + other
            once = first < second
            yield Pairs(positions[first[once]], positions[second[once]], scores[once])
        progress("comparing", min(start + _BLOCK, len(vectors)), len(vectors))


def _above(left: "torch.Tensor", right: "torch.Tensor", threshold: float) -> tuple[Ints, Ints, Floats]:
    scores = left @ right.T
    found = (scores >= threshold).nonzero()
    return found[:, 0].numpy(), found[:, 1].numpy(), scores[found[:, 0], found[:, 1]].clamp(max=1).numpy()


def _listed_pairs(
    matrix: Matrix, positions: Ints, threshold: float, prepare: Preparation, progress: Progress
) -> Iterator[Pairs]:
    centres = _centres(matrix, positions, prepare)
    probes = _probes(matrix, positions, centres, threshold, prepare, progress)  # (n, probes), -1 where none
    for number, entries in enumerate(_by_list(probes.ravel(), len(centres))):
        queries, home = entries // probes.shape[1], entries % probes.shape[1] == 0
        yield from _list_pairs(matrix, positions, queries, queries[home], probes, threshold, prepare)
        progress("comparing", number + 1, len(centres))


def _by_list(numbers: NDArray[np.int32], lists: int) -> Iterator[Ints]:
    """For each list, where `numbers` name it, ascending.

    A sixteenth of the lists is sorted at a time: the places of all of them would take twice what `numbers` do.
    """
    step = -(-lists // _SORTED_IN)
    for low in range(0, lists, step):
        high = min(low + step, lists)
        inside = numbers >= low
        inside &= numbers < high
        places = np.flatnonzero(inside)
        del inside
        places = places[np.argsort(numbers[places], kind="stable")]
        bounds = np.searchsorted(numbers[places], np.arange(low, high + 1))
        for start, stop in pairwise(bounds.tolist()):
            yield places[start:stop]


def _centres(matrix: Matrix, positions: Ints, prepare: Preparation) -> Floats:
    import faiss

    count = int(np.sqrt(len(positions)))
    rng = np.random.default_rng(_SEED)
    sample = np.sort(rng.choice(positions, min(len(positions), _SAMPLE_PER_LIST * count), replace=False))
    training = faiss.Kmeans(
        matrix.dim, count, niter=_TRAINING_ROUNDS, spherical=True, seed=_SEED, max_points_per_centroid=_SAMPLE_PER_LIST
    )
    training.train(prepare.apply(matrix.take(sample)))
    return np.asarray(training.centroids, np.float32)


def _probes(
    matrix: Matrix, positions: Ints, centres: Floats, threshold: float, prepare: Preparation, progress: Progress
) -> NDArray[np.int32]:
    """(n, probes) numbers of the lists to look into, nearest centre first.

    Two unit vectors of cosine t are √(2 − 2t) apart, and moving by that changes the cosine to a centre by at most as
    much; half of it covers nearly all pairs, since in many dimensions most of the way leads past the centres.
    """
    import torch

    margin = 0.5 * float(np.sqrt(max(0.0, 2 - 2 * threshold)))
    weights = torch.from_numpy(centres).T
    probes = np.empty((len(positions), min(_PROBES, len(centres))), np.int32)
    done = 0
    for at, vectors in matrix.chunks(positions, release=True):
        values, lists = torch.topk(torch.from_numpy(prepare.apply(vectors)) @ weights, probes.shape[1], dim=1)
        lists[values < values[:, :1] - margin] = -1
        probes[done : done + len(at)] = lists.numpy()
        done += len(at)
        progress("sorting into lists", done, len(positions))
    return probes


def _list_pairs(
    matrix: Matrix,
    positions: Ints,
    queries: Ints,
    members: Ints,
    probes: NDArray[np.int32],
    threshold: float,
    prepare: Preparation,
) -> Iterator[Pairs]:
    import torch

    for begin in range(0, len(members), _BLOCK):
        some = members[begin : begin + _BLOCK]
        base = torch.from_numpy(prepare.apply(matrix.take(positions[some])))
        for start in range(0, len(queries), _BLOCK):
            asked = queries[start : start + _BLOCK]
            found = _above(torch.from_numpy(prepare.apply(matrix.take(positions[asked]))), base, threshold)
            query, member = asked[found[0]], some[found[1]]
            # The pair is met again from its other end if that one probes this one's list: then the lower one counts.
            twice = (probes[member] == probes[query, :1]).any(axis=1)
            once = (query < member) | ((query > member) & ~twice)
            low, high = np.minimum(query, member)[once], np.maximum(query, member)[once]
            yield Pairs(positions[low], positions[high], found[2][once])
