"""k-means: as good as scikit-learn's, streamed as in memory, and what it writes."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from support.runs import RunContent, clustered, write_run

from pipeline.retrieval import kmeans
from pipeline.retrieval.arrays import Preparation, unit
from pipeline.retrieval.clustering import cluster
from pipeline.retrieval.clusters import top_labels, write_clusters
from pipeline.retrieval.kmeans import fit
from pipeline.retrieval.lloyd import ArraySource, MatrixSource, assign, lloyd, totals
from pipeline.retrieval.plots import line_charts
from pipeline.retrieval.store import FeatureStore
from pipeline.retrieval.sweep import Trial, best_k, elbow, parse_sweep, sweep
from schemas.errors import SpecError

STARTS = """
import resource
import numpy as np
from pipeline.retrieval import kmeans, lloyd
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
lloyd._SCORE_BYTES = 4 << 20
rng = np.random.default_rng(0)
vectors = rng.standard_normal((65_536, 1024), np.float32)
kmeans.swapped(vectors[:999], kmeans.greedy_start(vectors[:999], 4, rng), rng)
before = peak()
centres = kmeans.greedy_start(vectors, 4, rng)
between = peak()
kmeans.swapped(vectors, centres, rng)
print(*((size / vectors.nbytes) for size in (between - before, peak() - before)))
"""


def source_of(folder: Path, content: RunContent, prepare: Preparation) -> MatrixSource:
    matrix = FeatureStore.open(str(write_run(folder, content))).load("cls")
    return MatrixSource(matrix, np.flatnonzero(matrix.usable), prepare)


@pytest.mark.parametrize(("k", "spread"), [(24, 0.4), (24, 1.5), (5, 0.8)])
@pytest.mark.parametrize("spherical", [False, True])
def test_inertia_within_one_percent_of_the_best_of_ten(k: int, spread: float, spherical: bool) -> None:
    vectors = clustered(2500, 32, 24, seed=k, spread=spread)
    vectors = unit(vectors) if spherical else vectors
    found = fit(ArraySource(vectors), k, spherical=spherical)
    reference = KMeans(k, n_init=10, random_state=0).fit(vectors)
    if spherical:
        # scikit-learn's centres, put on the sphere: the best it can offer for this measure.
        reference_inertia = float(assign(vectors, unit(reference.cluster_centers_))[1].sum())
    else:
        reference_inertia = reference.inertia_
    assert found.inertia <= 1.01 * reference_inertia
    assert found.inertia == pytest.approx(float(assign(vectors, found.centres)[1].sum()), rel=1e-4)


@pytest.mark.parametrize("mini_batch", [False, True])
def test_sampled_start_and_mini_batches_reach_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini_batch: bool
) -> None:
    vectors = clustered(12_000, 24, 30, seed=1, spread=0.8)
    source = source_of(tmp_path, RunContent({"cls": vectors}), Preparation(normalise=False))
    monkeypatch.setattr(kmeans, "_SAMPLE_ROWS", 4_000)
    found = fit(source, 30, spherical=False, mini_batch=mini_batch)
    reference = KMeans(30, n_init=5, random_state=0).fit(vectors)
    assert found.inertia <= 1.01 * reference.inertia_


def test_result_does_not_depend_on_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(5000, 16, 9, seed=3, spread=1.0)
    source = source_of(tmp_path, RunContent({"cls": vectors}), Preparation(normalise=False))
    whole = lloyd(source, vectors[:9], spherical=False)
    monkeypatch.setattr("pipeline.retrieval.matrix.CHUNK_BYTES", 4 * 16 * 77)
    pieces = lloyd(source, vectors[:9], spherical=False)
    assert pieces.rounds == whole.rounds
    np.testing.assert_allclose(pieces.centres, whole.centres, atol=1e-5)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_the_inertia_is_that_of_the_centres_given_back(rounds: int) -> None:
    vectors = clustered(800, 16, 9, seed=3, spread=1.0)
    found = lloyd(ArraySource(vectors), vectors[:9], spherical=False, rounds=rounds, tolerance=0)
    assert found.rounds == rounds
    assert found.inertia == pytest.approx(float(assign(vectors, found.centres)[1].sum()), rel=1e-6)


def test_totals_of_a_chunk() -> None:
    vectors = np.array([[0, 1], [0, 3], [10, 0], [14, 0]], np.float32)
    found = totals(vectors, np.array([[0, 0], [99, 99], [11, 0]], np.float32))
    np.testing.assert_array_equal(found.counts, [2, 0, 2])
    np.testing.assert_array_equal(found.sums, [[0, 4], [0, 0], [24, 0]])
    assert found.inertia == 1 + 9 + 1 + 9
    assert found.reach == 9


def test_scores_of_many_centres_are_gone_through_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 12,000 × 3,000 scores at once would be more than 64 MiB, and with k = 10,000 more than a machine has."""
    vectors = clustered(12_000, 4, 3000, seed=8, spread=0.2)
    centres = vectors[:3000]
    squares = cdist(vectors.astype(np.float64), centres.astype(np.float64), "sqeuclidean")
    made: list[int] = []

    def counted(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*arguments: Any, **options: Any) -> torch.Tensor:
            made.append((scores := function(*arguments, **options)).nbytes)
            return scores

        return call

    monkeypatch.setattr(torch, "addmm", counted(torch.addmm))
    monkeypatch.setattr(torch, "cdist", counted(torch.cdist))
    numbers, distances = assign(vectors, centres)
    np.testing.assert_allclose(distances, squares.min(axis=1), atol=1e-5)
    np.testing.assert_allclose(squares[np.arange(len(vectors)), numbers], squares.min(axis=1), atol=1e-5)
    first, second, home = kmeans._nearest_two(torch.from_numpy(vectors), torch.from_numpy(centres))
    nearest = np.partition(squares, 1, axis=1)[:, :2]
    np.testing.assert_allclose(np.stack([first, second], axis=1), nearest, atol=1e-5)
    np.testing.assert_allclose(squares[np.arange(len(vectors)), home], nearest[:, 0], atol=1e-5)
    kmeans.swapped(vectors, centres, np.random.default_rng(0))
    assert max(made) <= 64 * 1024**2


def test_starts_and_swaps_hold_no_copy_of_the_sample() -> None:
    """With k = 10,000 that is 64 vectors for each, or 2.6 GB where they have 1,024 numbers."""
    done = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True, check=True)
    assert max(map(float, done.stdout.split())) < 0.5


def test_empty_clusters_are_filled() -> None:
    vectors = np.concatenate([np.zeros((50, 4)), np.ones((50, 4)), 9 * np.ones((50, 4))]).astype(np.float32)
    vectors += np.random.default_rng(0).normal(0, 0.01, vectors.shape).astype(np.float32)
    found = lloyd(ArraySource(vectors), 5 * np.float32([[1] * 4, [99] * 4, [98] * 4]), spherical=False)
    assert (np.bincount(assign(vectors, found.centres)[0], minlength=3) > 0).all()


def test_fewer_different_vectors_than_clusters_ends() -> None:
    vectors = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0)
    found = fit(ArraySource(vectors), 8, spherical=False, restarts=2)
    assert found.inertia == pytest.approx(0, abs=1e-6)
    assert found.rounds < 10


@pytest.mark.parametrize("k", [0, 11])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(SpecError, match=rf"-k {k}: there are 10 usable vectors"):
        fit(ArraySource(np.eye(10, dtype=np.float32)), k, spherical=False)


def test_files(tmp_path: Path) -> None:
    vectors = np.repeat(np.eye(3, 8, dtype=np.float32), 20, axis=0)
    vectors += np.random.default_rng(0).normal(0, 0.01, vectors.shape).astype(np.float32)
    vectors[7] = np.nan
    labels = [[(0, ["cat", "dog", "it's <b>"][row // 20] if row % 5 else "animal", 0.9)] for row in range(60)]
    store = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": vectors}, labels=labels))))
    prepare = store.preparation("cls")
    matrix = store.load("cls")
    found = fit(MatrixSource(matrix, np.flatnonzero(matrix.usable), prepare), 3, spherical=True)
    summary = write_clusters(store, matrix, prepare, found, "shapes", {"feature": "cls"})
    table = pq.read_table(tmp_path / "clusters" / "shapes")
    assert table.schema.names == ["row", "cluster", "distance"]
    assert table.column("row").to_pylist() == [row for row in range(60) if row != 7]
    assert max(table.column("distance").to_pylist()) < 0.01
    assert summary == json.loads((tmp_path / "clusters" / "shapes.json").read_text())
    assert summary["left_out"] == {"count": 1, "rows": [7]}
    by_medoid = sorted(summary["clusters"], key=lambda item: item["medoid"]["row"])
    assert [item["size"] for item in by_medoid] == [19, 20, 20]
    assert [item["labels"][0]["label"] for item in by_medoid] == ["cat", "dog", "it's <b>"]
    assert by_medoid[1]["labels"][0] == {"label": "dog", "share": 0.8, "base": pytest.approx(16 / 59)}
    assert all(entry["label"] != "animal" for item in by_medoid[1:] for entry in item["labels"][:1])
    assert np.load(tmp_path / "clusters" / "shapes.centres.npy").shape == (3, 8)


@pytest.mark.parametrize("column", ["cluster", "distance", "row"])
def test_label_columns_named_as_ours(tmp_path: Path, column: str) -> None:
    kinds = ["a", "b", "c"]
    user = {name: [kinds[row // 20] for row in range(60)] for name in ("cluster", "distance")}
    vectors = np.repeat(np.eye(3, 8, dtype=np.float32), 20, axis=0)
    store = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": vectors}, user=user))))
    found = fit(ArraySource(vectors), 3, spherical=True)
    settings = {"label_column": column}
    summary = write_clusters(store, store.load("cls"), store.preparation("cls"), found, "own", settings)
    best = sorted(item["labels"][0]["label"] for item in summary["clusters"])
    assert best == (["0", "20", "40"] if column == "row" else kinds)


def test_columns_named_like_ours_say_what_clusters_hold(tmp_path: Path) -> None:
    vectors = np.repeat(np.eye(2, 4, dtype=np.float32), 10, axis=0)
    labels = [[(row // 10, ["cat", "dog"][row // 10], 0.9)] for row in range(20)]
    user = {"Format": [["raw", "jpg"][row // 10] for row in range(20)], "cluster": ["theirs"] * 20}
    store = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": vectors}, labels=labels, user=user))))
    (tmp_path / "clusters" / "two").mkdir(parents=True)
    table = pa.table({"row": range(20), "cluster": [row // 10 for row in range(20)]})
    pq.write_table(table, tmp_path / "clusters" / "two" / "clusters.parquet")
    for column, names in ((None, ["cat", "dog"]), ("Format", ["raw", "jpg"])):
        found = top_labels(store, str(tmp_path / "clusters" / "two"), column)
        assert [found[number][0]["label"] for number in (0, 1)] == names


def test_empty_cells_say_nothing_about_a_cluster(tmp_path: Path) -> None:
    user = {"kind": ["", " ", "cat", None] * 5 + ["dog", "", "dog", "dog"] * 5}
    vectors = np.repeat(np.eye(2, 4, dtype=np.float32), 20, axis=0)
    store = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": vectors}, user=user))))
    (tmp_path / "clusters" / "two").mkdir(parents=True)
    table = pa.table({"row": range(40), "cluster": [row // 20 for row in range(40)]})
    pq.write_table(table, tmp_path / "clusters" / "two" / "clusters.parquet")
    found = top_labels(store, str(tmp_path / "clusters" / "two"), "kind")
    # The shares are those of all rows, of which 5 of 20 say cat and 15 of 20 say dog.
    assert [found[number] for number in (0, 1)] == [
        [{"label": "cat", "share": 0.25, "base": 0.125}],
        [{"label": "dog", "share": 0.75, "base": 0.375}],
    ]


def test_labels_are_those_of_the_clustering_whatever_the_others_are_called(tmp_path: Path) -> None:
    """DuckDB ignores case, so the view of `a` cannot be called after it where there is an `A`."""
    labels = [[(row // 10, ["cat", "dog"][row // 10], 0.9)] for row in range(20)]
    vectors = np.repeat(np.eye(2, 4, dtype=np.float32), 10, axis=0)
    store = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": vectors}, labels=labels))))
    for name, numbers in (("A", range(20)), ("a", [row // 10 for row in range(20)])):
        (tmp_path / "clusters" / name).mkdir(parents=True)
        pq.write_table(
            pa.table({"row": range(20), "cluster": numbers}), tmp_path / "clusters" / name / "clusters.parquet"
        )
    found = top_labels(store, str(tmp_path / "clusters" / "a"))
    assert {number: [item["label"] for item in best] for number, best in found.items()} == {0: ["cat"], 1: ["dog"]}


def test_sweep_finds_the_number_of_clusters() -> None:
    source = ArraySource(clustered(1500, 24, 12, seed=5, spread=0.3))
    trials = sweep(source, [4, 8, 10, 11, 12, 13, 14, 18, 24, 30], spherical=False)
    assert best_k(trials) in (11, 12, 13)
    assert elbow(trials) in range(9, 16)
    with pytest.raises(SpecError, match="1500 usable vectors"):
        sweep(source, [2, 1500], spherical=False)


def test_sweep_values() -> None:
    assert parse_sweep("2:5") == [2, 3, 4, 5]
    assert parse_sweep("8:64:28") == [8, 36, 64]
    values = parse_sweep("8:64")
    assert (values[0], values[-1], len(values)) == (8, 64, 12)
    for bad in ("8", "1:5", "9:4", "a:b", "2:9:0", "2:9:1:1"):
        with pytest.raises(SpecError, match="--sweep"):
            parse_sweep(bad)


def test_elbow_of_a_bend() -> None:
    assert elbow([Trial(k, max(100 - 10 * k, 22 - 2 * k), 0.0) for k in range(2, 11)]) in (9, 10)
    assert elbow([Trial(2, 1.0, 0.0), Trial(3, 2.0, 0.0)]) == 2


def test_chart_is_well_formed() -> None:
    svg = line_charts([("inertia <k>", [2, 4, 8], [3.0, 2.0, 1.5], 4), ("flat", [2, 4], [1.0, 1.0], 2)], "k")
    root = ElementTree.fromstring(svg)
    assert len(root.findall(".//{http://www.w3.org/2000/svg}circle")) == 5


def test_charts_have_colours_where_light_dark_is_unknown() -> None:
    """Older browsers and most other programs that show SVG leave out what they do not know."""
    svg = line_charts([("inertia", [2, 4], [3.0, 2.0], 4)], "k")
    known = re.sub(r"[a-z]+:light-dark\([^)]*\);?", "", svg)
    assert known != svg
    for rule in ("text{fill:#222;", ".axis{stroke:#999;", ".back{fill:#fff;"):
        assert rule in known


def test_clusters_from_python(tmp_path: Path) -> None:
    vectors = clustered(300, 8, 3, seed=2, spread=0.1)
    vectors[7] = 0
    store = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": vectors}))))
    summary = cluster(store, "cls", ks=[2, 3, 5])
    assert (summary["name"], summary["k"], summary["left_out"]["rows"]) == ("k3", 3, [7])
    assert [trial["k"] for trial in summary["sweep"]] == [2, 3, 5]
    assert json.loads((tmp_path / "clusters" / "k3.json").read_text()) == summary
    assert (tmp_path / "clusters" / "k3.svg").exists()
    assert cluster(store, "cls", k=2, name="two", spherical=False, mini_batch=True)["kind"] == "euclidean"
    assert not (tmp_path / "clusters" / "two.svg").exists()
    for wrong in ({}, {"k": 2, "ks": [2, 3]}):
        with pytest.raises(SpecError, match="either -k N or --sweep"):
            cluster(store, "cls", **wrong)
    with pytest.raises(SpecError, match="-k 300"):
        cluster(store, "cls", k=300)
