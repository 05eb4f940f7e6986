"""k-means from a run's vectors to `clusters/NAME/`: into k clusters, or as many as the best of several k."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.retrieval.clusters import check_label_column, write_clusters
from pipeline.retrieval.kmeans import fit
from pipeline.retrieval.lloyd import MatrixSource
from pipeline.retrieval.output import check_name, place
from pipeline.retrieval.plots import line_charts
from pipeline.retrieval.store import FeatureStore
from pipeline.retrieval.sweep import Trial, best_k, elbow, sweep
from pipeline.storage import put_bytes
from schemas.errors import SpecError


class Swept(NamedTuple):
    """What a sweep found: the k to take, and where the curve of the inertia bends."""

    trials: list[Trial]
    k: int
    bend: int


def check_one(k: int | None, ks: Sequence[int] | str | None) -> None:
    """Raise SpecError unless either k or several of them are given."""
    if (k is None) == (ks is None):
        raise SpecError("give either -k N or --sweep LOW:HIGH")


def cluster(
    store: FeatureStore,
    feature: str,
    *,
    k: int | None = None,
    ks: Sequence[int] | None = None,
    name: str | None = None,
    spherical: bool = True,
    centre: bool = False,
    label_column: str | None = None,
    seed: int = 0,
    mini_batch: bool | None = None,
) -> dict[str, Any]:
    """Cluster a feature into `k`, or the best of `ks`, and write `clusters/NAME/`, by default `k24` for k = 24.

    `mini_batch` moves centres by batches; if not said, where the vectors take more than half of the memory. The summary
    comes back as it is written; the curves of a sweep go to `NAME.svg`. Raises OutputError if there is no such feature,
    SpecError unless either k or `ks` is given, for more clusters than usable vectors, for a name that is none, or a
    label column that is not there.
    """
    check_one(k, ks)
    check_name(name or "k")
    check_label_column(store, label_column)
    matrix = store.load(feature)
    prepare = store.preparation(feature, normalise=spherical, centre=centre)
    source = MatrixSource(matrix, np.flatnonzero(matrix.usable), prepare)
    settings: dict[str, Any] = {"feature": feature, "centre": centre, "seed": seed, "label_column": label_column}
    swept = None
    if ks is not None:
        trials = sweep(source, ks, spherical=spherical, seed=seed, progress=store.progress)
        swept = Swept(trials, best_k(trials), elbow(trials))
        settings |= {"sweep": [trial._asdict() for trial in trials], "elbow": swept.bend}
    chosen = swept.k if swept else int(k or 0)
    name = name or f"k{chosen}"
    batches = 4 * len(source) * matrix.dim > _memory_bytes() // 2 if mini_batch is None else mini_batch
    found = fit(source, chosen, spherical=spherical, seed=seed, mini_batch=batches, progress=store.progress)
    summary = write_clusters(store, matrix, prepare, found, name, {"name": name, **settings, "mini_batch": batches})
    if swept:
        put_bytes(store.fs, f"{place(store.root, 'clusters', name)}.svg", _curves(swept).encode())
    return summary


def _curves(swept: Swept) -> str:
    tried = [float(trial.k) for trial in swept.trials]
    charts = [
        ("inertia for each vector", tried, [trial.inertia for trial in swept.trials], float(swept.bend)),
        ("silhouette", tried, [trial.silhouette for trial in swept.trials], float(swept.k)),
    ]
    return line_charts(charts, "k")


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
