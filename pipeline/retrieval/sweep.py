"""How many clusters: k-means for several k on a sample, judged by inertia (elbow) and silhouette."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.retrieval.arrays import Progress, no_progress
from pipeline.retrieval.kmeans import fit
from pipeline.retrieval.lloyd import ArraySource, Source, assign
from schemas.errors import SpecError

_SAMPLE_ROWS = 20_000
_SILHOUETTE_ROWS = 3_000
_STEPS = 12
_RESTARTS = 3


class Trial(NamedTuple):
    """One k: mean squared distance to the centre, and the mean silhouette (Rousseeuw 1987), both of the sample."""

    k: int
    inertia: float
    silhouette: float


def parse_sweep(text: str) -> list[int]:
    """`8:64`: twelve values at most, in equal ratios; `8:64:4`: every fourth. Raises SpecError for anything else."""
    try:
        low, high, *step = (int(part) for part in text.split(":"))
        if not (2 <= low < high and len(step) <= 1 and all(value > 0 for value in step)):
            raise ValueError
    except ValueError:
        raise SpecError(
            f"--sweep {text}: expected LOW:HIGH or LOW:HIGH:STEP with 2 <= LOW < HIGH, such as 8:64"
        ) from None
    if step:
        return list(range(low, high + 1, step[0]))
    return sorted({round(value) for value in np.geomspace(low, high, min(_STEPS, high - low + 1))})


def sweep(
    source: Source, ks: Sequence[int], *, spherical: bool, seed: int = 0, progress: Progress = no_progress
) -> list[Trial]:
    """A trial for each of `ks`. Raises SpecError if a k is not below the number of vectors."""
    from sklearn.metrics import silhouette_score

    if max(ks) >= len(source):
        raise SpecError(f"--sweep up to {max(ks)}: there are {len(source)} usable vectors; stay below that")
    rng = np.random.default_rng(seed)
    sample = source.sample(max(_SAMPLE_ROWS, 50 * max(ks)), rng)
    some = rng.choice(len(sample), min(_SILHOUETTE_ROWS, len(sample)), replace=False)
    trials = []
    for number, k in enumerate(ks):
        found = fit(ArraySource(sample), k, spherical=spherical, seed=seed, restarts=_RESTARTS)
        numbers, _ = assign(sample[some], found.centres)
        # With as many labels as vectors, or with one, the silhouette is not defined.
        defined = 2 <= len(np.unique(numbers)) < len(some)
        silhouette = float(silhouette_score(sample[some], numbers)) if defined else 0.0
        trials.append(Trial(k, found.inertia / len(sample), silhouette))
        progress("trying k", number + 1, len(ks))
    return trials


def best_k(trials: Sequence[Trial]) -> int:
    """The k of the highest silhouette, of equals the smallest."""
    return max(trials, key=lambda trial: (trial.silhouette, -trial.k)).k


def elbow(trials: Sequence[Trial]) -> int:
    """The k whose inertia lies farthest below the line from the first trial to the last (Satopää 2011)."""
    ks, inertias = (np.array([getattr(trial, key) for trial in trials], float) for key in ("k", "inertia"))
    if len(trials) < 3 or inertias[0] <= inertias[-1]:
        return trials[0].k
    across, down = (ks - ks[0]) / (ks[-1] - ks[0]), (inertias[0] - inertias) / (inertias[0] - inertias[-1])
    return trials[int(np.argmax(down - across))].k
