"""The same over parts on a real Ray as on one machine."""

import os
import signal
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.cluster import KMeans
from support.runs import RunContent, clustered, write_run

from cluster.session import ray_session
from jobs.retrieve_groups import kmeans
from pipeline.retrieval import index as indexes
from pipeline.retrieval import ray_kmeans
from pipeline.retrieval.arrays import Preparation, unit
from pipeline.retrieval.lloyd import Clustering, assign
from pipeline.retrieval.ray_index import build_on_ray
from pipeline.retrieval.ray_kmeans import kmeans_on_ray, reader_rows
from pipeline.retrieval.ray_parts import PartReader, over_parts
from pipeline.retrieval.recall import evaluate, tune
from pipeline.retrieval.store import FeatureStore
from schemas.errors import ClusterError, OutputError, SpecError

pytestmark = pytest.mark.slow

VECTORS = clustered(6000, 16, 12, seed=6, spread=0.6)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    vectors = VECTORS.copy()
    vectors[123] = 0
    content = RunContent({"cls": vectors}, parts=12, replaces={5000: 4})
    return FeatureStore.open(str(write_run(tmp_path_factory.mktemp("run"), content)))


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with ray_session(cpus=2):
        yield


def test_kmeans_over_parts(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.retrieval.ray_kmeans._SAMPLE_ROWS", 2000)
    settings = {"feature": "cls", "seed": 0, "label_column": None}
    summary = kmeans_on_ray(store, "cls", 12, "parts", spherical=True, settings=settings)
    vectors = unit(np.delete(VECTORS, [4, 123], axis=0))
    reference = KMeans(12, n_init=10, random_state=0).fit(vectors)
    assert summary["inertia"] <= 1.01 * float(assign(vectors, unit(reference.cluster_centers_))[1].sum())
    assert summary["left_out"] == {"count": 1, "rows": [123]}
    table = pq.read_table(Path(store.root, "clusters", "parts"))
    assert sorted(table.column("row").to_pylist()) == [row for row in range(6000) if row not in (4, 123)]
    assert len(list(Path(store.root, "clusters", "parts").glob("*.parquet"))) == 12
    assert sum(item["size"] for item in summary["clusters"]) == 5998


def test_kmeans_lets_go_of_the_samples_of_parts_once_they_are_together(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[weakref.ref[np.ndarray]] = []

    def noted(*work: Any) -> Iterator[Any]:
        for part, vectors in over_parts(*work):
            came.append(weakref.ref(vectors))
            yield part, vectors

    def fit(source: Any, *_: Any, **__: Any) -> None:
        assert (len(came), len(source)) == (12, 5998)
        assert not any(vectors() is not None for vectors in came)
        raise InterruptedError

    monkeypatch.setattr(ray_kmeans, "over_parts", noted)
    monkeypatch.setattr(ray_kmeans, "fit", fit)
    with pytest.raises(InterruptedError):
        kmeans_on_ray(store, "cls", 12, "let-go", spherical=True, settings={"seed": 0, "label_column": None})


def test_passes_go_on_while_a_cluster_is_empty(tmp_path: Path) -> None:
    # All vectors are as far from their mean as from each other, so a centre that fills takes one of them at a time.
    vectors = unit(np.random.default_rng(0).standard_normal((20_000, 64), np.float32))
    store = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": vectors}))))
    reader = PartReader(store.fs, "cls", 64, Preparation(normalise=False), store.replaced)
    centres = np.stack([vectors.mean(axis=0), *(np.full(64, far, np.float32) for far in (50, 60, 70))])
    found = ray_kmeans._passes(store, reader, Clustering(centres, 0.0, 0, spherical=False))
    assert (np.bincount(assign(vectors, found.centres)[0], minlength=4) > 0).all()


def test_kmeans_that_is_interrupted_leaves_the_earlier_clusters(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> dict[Path, int]:
        folder = Path(store.root, "clusters")
        return {path: path.stat().st_mtime_ns for path in [*folder.glob("kept/*"), *folder.glob("kept.*")]}

    def interrupt(what: str, *_: int) -> None:
        if what == "writing clusters":
            raise KeyboardInterrupt

    settings = {"feature": "cls", "seed": 0, "label_column": None}
    kmeans_on_ray(store, "cls", 3, "kept", spherical=True, settings=settings)
    before = files()
    assert len(before) == 12 + 2
    monkeypatch.setattr(store, "progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kmeans_on_ray(store, "cls", 2, "kept", spherical=True, settings=settings)
    assert files() == before


def test_kmeans_names_what_is_left_out_without_reading_the_vectors_here(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_here(*_: object) -> None:
        raise AssertionError("the driver read all vectors")

    monkeypatch.setattr(FeatureStore, "load", read_here)
    assert kmeans(store.root, k=3, name="three", ray="local") == 0
    assert "1 rows have a zero or non-finite `cls` and are left out: 123" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "column", "match"), [("a/b", None, "--name 'a/b'"), ("x", "typo", "has the columns")])
def test_kmeans_checks_before_the_tasks_run(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, name: str, column: str | None, match: str
) -> None:
    monkeypatch.setattr("pipeline.retrieval.ray_kmeans.over_parts", None)
    with pytest.raises(SpecError, match=match):
        kmeans_on_ray(store, "cls", 3, name, spherical=True, settings={"seed": 0, "label_column": column})


def test_a_folder_that_workers_do_not_see_is_explained(store: FeatureStore, tmp_path: Path) -> None:
    absent = [replace(part, path=str(tmp_path / part.name)) for part in store.parts]
    reader = PartReader(store.fs, "cls", 16, Preparation(), store.replaced)
    with pytest.raises(OutputError, match=r"is not there .* a local folder has to be one that all nodes share"):
        list(over_parts(reader_rows, absent, reader))


@pytest.mark.parametrize("kind", ["flat", "ivf-flat", "ivf-pq"])
def test_index_over_parts(store: FeatureStore, kind: indexes.Kind) -> None:
    built = tune(build_on_ray(store, feature="cls", kind=kind), store.load("cls"))
    np.testing.assert_array_equal(np.sort(indexes.stored_rows(built)), np.delete(np.arange(6000), [4, 123]))
    assert evaluate(built, store.load("cls"), queries=50)["recall_at_10"] >= 0.95
    indexes.save(store, built, kind)
    assert indexes.load(store, kind).record.rows == 5998


def test_hnsw_is_refused(store: FeatureStore) -> None:
    with pytest.raises(SpecError, match="hnsw cannot be built over parts"):
        build_on_ray(store, feature="cls", kind="hnsw")


def _fail(part: object) -> None:
    raise SpecError("no")


def test_an_error_of_a_task_is_the_error_here(store: FeatureStore) -> None:
    with pytest.raises(SpecError, match="no"):
        list(over_parts(_fail, store.parts))


def _killed(part: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_that_is_killed_each_time_is_one_message(store: FeatureStore) -> None:
    with pytest.raises(ClusterError, match=r"WorkerCrashedError: .*\. What was there before stays"):
        list(over_parts(_killed, store.parts[:1]))
