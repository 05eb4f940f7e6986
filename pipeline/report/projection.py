"""A map of the features in two dimensions: UMAP where it is installed, else PCA.

Features are far too large to read whole, so row groups are drawn at random until a budget of bytes is met, eight of
them at least, and rows at random within them. A small run is covered entirely.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.report.lookup import Piece, pieces
from pipeline.report.run import BATCH_ROWS, RunDirectory, open_part
from pipeline.report.scan import ABSENT, ImageScan

_BUDGET_BYTES = 256 * 1024 * 1024
_LEAST_GROUPS = 8
_PCA_ITERATIONS = 12


@dataclass(frozen=True)
class FeatureMap:
    """`points` (N×2, in 0…1, y downwards) of `rows`, how they came about, and how many were left out as not finite."""

    rows: NDArray[np.int64]
    points: NDArray[np.float64]
    method: str
    left_out: int


class Sample(NamedTuple):
    """Some `rows`, ascending, and their `features` (N×D), from `read` of the `groups` row groups there are."""

    rows: NDArray[np.int64]
    features: NDArray[np.float32]
    read: int
    groups: int


def sample_features(run: RunDirectory, feature: str, scan: ImageScan, count: int, seed: int) -> Sample:
    """At most `count` of the rows in `scan`, drawn at random from row groups drawn at random."""
    there = pieces(run, "images")
    chosen = _choose_pieces(there, feature, seed)
    reachable = np.concatenate([np.empty(0, np.int64), *(_rows_of(run, piece) for piece in chosen)])
    # Rows beyond those that were scanned came meanwhile, by an update.
    reachable = np.unique(reachable[(reachable >= 0) & (reachable < len(scan.codes))])
    reachable = reachable[scan.codes[reachable] != ABSENT]
    generator = np.random.default_rng(seed)
    drawn = np.sort(generator.choice(reachable, min(count, len(reachable)), replace=False))
    found = [(part, block) for piece in chosen for part, block in _features_of(run, piece, feature, drawn)]
    if not found:
        return Sample(np.empty(0, np.int64), np.empty((0, 0), np.float32), len(chosen), len(there))
    order = np.argsort(numbers := np.concatenate([part for part, _ in found]))
    features = np.concatenate([block for _, block in found])[order]
    return Sample(numbers[order], features, len(chosen), len(there))


def _choose_pieces(found: list[Piece], feature: str, seed: int) -> list[Piece]:
    order = np.random.default_rng(seed).permutation(len(found))
    chosen: list[Piece] = []
    spent = 0
    for index in order:
        spent += found[index].compressed_bytes.get(feature, 0)
        if spent > _BUDGET_BYTES and len(chosen) >= _LEAST_GROUPS:
            break
        chosen.append(found[index])
    return chosen


def _rows_of(run: RunDirectory, piece: Piece) -> NDArray[np.int64]:
    with open_part(run.fs, piece.path) as part:
        rows: NDArray[np.int64] = part.read_row_group(piece.group, columns=["row"]).column("row").to_numpy()
    return rows


def _features_of(
    run: RunDirectory, piece: Piece, feature: str, drawn: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    wanted = pa.array(drawn)
    with open_part(run.fs, piece.path) as part:
        for batch in part.iter_batches(BATCH_ROWS // 8, row_groups=[piece.group], columns=["row", feature]):
            some = batch.filter(pc.is_in(batch.column("row"), value_set=wanted))
            vectors = some.column(feature)
            some = some.filter(vectors.is_valid())
            if len(some):
                flat = some.column(feature).flatten().to_numpy(zero_copy_only=False)
                yield some.column("row").to_numpy(), flat.reshape(len(some), -1).astype(np.float32)


def project(rows: NDArray[np.int64], features: NDArray[np.float32], seed: int) -> FeatureMap:
    """Lay L2-normalised features out in two dimensions. Fewer than three usable rows give an empty map."""
    norms = np.linalg.norm(features, axis=1) if features.size else np.empty(0, np.float32)
    usable = np.isfinite(norms) & (norms > 0)
    left_out = int(np.count_nonzero(~usable))
    if np.count_nonzero(usable) < 3:
        return FeatureMap(rows[:0], np.empty((0, 2)), "none", left_out)
    unit = (features[usable] / norms[usable, None]).astype(np.float64)
    points, method = _umap(unit, seed) if _has_umap() and len(unit) > 15 else _pca(unit, seed)
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - low) / np.where(high > low, high - low, 1.0)
    scaled[:, 1] = 1.0 - scaled[:, 1]
    return FeatureMap(rows[usable], scaled, method, left_out)


def _has_umap() -> bool:
    return importlib.util.find_spec("umap") is not None


def _umap(unit: NDArray[np.float64], seed: int) -> tuple[NDArray[np.float64], str]:
    import umap

    layout = umap.UMAP(n_components=2, metric="cosine", random_state=seed, n_jobs=1).fit_transform(unit)
    return np.asarray(layout, np.float64), "UMAP, cosine distance"


def _pca(unit: NDArray[np.float64], seed: int) -> tuple[NDArray[np.float64], str]:
    """The first two principal components, by subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4).

    It costs a few products with the data where a full decomposition costs D³. Each axis points to where its largest
    entry is positive.
    """
    centred = unit - unit.mean(axis=0)
    width = min(10, *centred.shape)
    block = np.random.default_rng(seed).standard_normal((centred.shape[1], width))
    for _ in range(_PCA_ITERATIONS):
        block = np.linalg.qr(centred.T @ (centred @ block)).Q
    _, values, mixed = np.linalg.svd(centred @ block, full_matrices=False)
    axes = block @ mixed[:2].T  # (D, 2)
    axes = axes * np.sign(axes[np.argmax(np.abs(axes), axis=0), [0, 1]])
    share = float((values[:2] ** 2).sum() / max(float((centred**2).sum()), 1e-12))
    return centred @ axes, f"PCA, {share:.0%} of the variance"
