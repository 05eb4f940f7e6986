"""k-means over parts on a Ray cluster, for more vectors than a machine holds.

    sample of every part ─▶ starts and swaps here ─▶ mini-batches of some parts ─▶ passes over all parts ─▶ write

A pass sends the centres out and gets sums back, k×D numbers a part; the clusters of a part are written by its task.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from fsspec import AbstractFileSystem

from pipeline.addresses import join
from pipeline.retrieval.arrays import Floats, Ints, Preparation
from pipeline.retrieval.clusters import Members, check_label_column, clusters_table, finish, new_members
from pipeline.retrieval.kmeans import fit, running_mean
from pipeline.retrieval.lloyd import ArraySource, Clustering, Totals, add, moved, totals
from pipeline.retrieval.output import check_name, replacing, write_table
from pipeline.retrieval.parts import Part, open_parquet
from pipeline.retrieval.ray_parts import PartReader, over_parts
from pipeline.retrieval.store import FeatureStore
from schemas.errors import SpecError

_SAMPLE_ROWS = 32_768
_PASSES = 20
_TOLERANCE = 1e-4
_BATCHES = 10
_BATCH_PARTS = 8


def kmeans_on_ray(
    store: FeatureStore, feature: str, k: int, name: str, *, spherical: bool, settings: dict[str, Any]
) -> dict[str, Any]:
    """Cluster feature `feature` and write `clusters/NAME/`, one file a part; returns the summary.

    Ray has to be connected. Raises SpecError if k is not between 1 and the number of vectors, and, before a vector is
    read, for a name that is none or a label column that is not there.
    """
    check_name(name)
    check_label_column(store, settings.get("label_column"))
    reader = PartReader(
        store.fs, feature, store.check_feature(feature), Preparation(normalise=spherical), store.replaced
    )
    rng = np.random.default_rng(settings["seed"])
    start = fit(ArraySource(_sampled(store, reader, k, rng)), k, spherical=spherical, seed=settings["seed"])
    found = _passes(store, reader, _mini_batches(store, reader, start, rng))
    return _write(store, reader, found, name, {"name": name, **settings, "parts": len(store.parts)})


def _sampled(store: FeatureStore, reader: PartReader, k: int, rng: np.random.Generator) -> Floats:
    """About 32,768 vectors, or 64 for each cluster; what came of each part is let go before they are worked on."""
    share = min(1.0, max(_SAMPLE_ROWS, 64 * k) / len(store))
    seeds = {part.name: int(rng.integers(2**31)) for part in store.parts}
    return np.concatenate([some for _, some in _ordered(store, over_parts(_sample, store.parts, reader, share, seeds))])


def _sample(part: Part, reader: PartReader, share: float, seeds: dict[str, int]) -> Floats:
    """About `share` of a part's vectors, at random."""
    rng = np.random.default_rng(seeds[part.name])
    chosen = [vectors[rng.random(len(vectors)) < share] for _, vectors in reader.batches(part)]
    return np.concatenate(chosen) if chosen else np.empty((0, reader.dim), np.float32)


def _part_totals(part: Part, reader: PartReader, centres: Floats) -> Totals | None:
    found: Totals | None = None
    for _, vectors in reader.batches(part):
        if len(vectors):
            found = add(found, totals(vectors, centres))
    return found


def _mini_batches(store: FeatureStore, reader: PartReader, start: Clustering, rng: np.random.Generator) -> Clustering:
    """Centres moved by random parts, a few at a time; nothing where there are only a few parts."""
    if len(store.parts) <= _BATCH_PARTS:
        return start
    centres, seen = start.centres, np.zeros(len(start.centres))
    for _ in range(_BATCHES):
        chosen = rng.choice(len(store.parts), _BATCH_PARTS, replace=False)
        found = _sum(over_parts(_part_totals, [store.parts[at] for at in sorted(chosen.tolist())], reader, centres))
        centres = running_mean(centres, found, seen, start.spherical)
    return Clustering(centres, start.inertia, start.rounds, start.spherical)


def _passes(store: FeatureStore, reader: PartReader, start: Clustering) -> Clustering:
    centres = start.centres
    history: list[float] = []
    while True:
        found = _sum(over_parts(_part_totals, store.parts, reader, centres))
        history.append(found.inertia)
        store.progress("k-means passes", len(history), _PASSES)
        settled = len(history) > 1 and history[-2] - history[-1] <= _TOLERANCE * history[-2]
        if (settled and not found.starved) or len(history) == _PASSES:
            return Clustering(centres, history[-1], len(history), start.spherical)
        centres = moved(centres, found, start.spherical)


def _sum(results: Any) -> Totals:
    found: Totals | None = None
    for _, part_found in results:
        found = found if part_found is None else add(found, part_found)
    if found is None:
        raise SpecError("nothing to cluster: no row has a usable vector")
    return found


def _write(
    store: FeatureStore, reader: PartReader, found: Clustering, name: str, settings: dict[str, Any]
) -> dict[str, Any]:
    members = new_members(len(found.centres))
    without: list[Ints] = []
    with replacing(store.fs, join(store.root, "clusters"), name) as home:
        folder = join(home, name)
        results = over_parts(_write_part, store.parts, reader, found, store.fs, folder)
        for number, (_, (part_members, rows)) in enumerate(results):
            _merge(members, part_members)
            without.append(rows)
            store.progress("writing clusters", number + 1, len(store.parts))
        left_out = np.setdiff1d(np.concatenate(without), store.replaced)
        return finish(store, left_out, found, members, folder, settings)


def _write_part(
    part: Part, reader: PartReader, found: Clustering, fs: AbstractFileSystem, folder: str
) -> tuple[Members, Ints]:
    """Write the clusters of one part; gives back its members and the ids of rows that have none."""
    members = new_members(len(found.centres))
    tables = [clusters_table(rows, vectors, found, members) for rows, vectors in reader.batches(part) if len(rows)]
    rows = reader_rows(part, reader)
    if not tables:
        return members, rows
    table = pa.concat_tables(tables)
    write_table(fs, join(folder, part.name), table)
    return members, np.setdiff1d(rows, table.column("row").to_numpy())


def reader_rows(part: Part, reader: PartReader) -> Ints:
    """All row ids of a part."""
    with open_parquet(reader.fs, part.path) as file:
        rows: Ints = file.read(columns=["row"]).column("row").to_numpy()
    return rows


def _merge(members: Members, more: Members) -> None:
    members.sizes += more.sizes
    nearer = more.nearest < members.nearest
    members.nearest[nearer], members.medoids[nearer] = more.nearest[nearer], more.medoids[nearer]


def _ordered(store: FeatureStore, results: Any) -> list[tuple[Part, Any]]:
    """Results in the order of the parts, so that the same seed gives the same clusters."""
    found = {part.name: result for part, result in results}
    return [(part, found[part.name]) for part in store.parts]
