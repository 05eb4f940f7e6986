"""The index: recall, what it records, when it is stale, and how it is brought up to date."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.runs import RunContent, clustered, write_run

from pipeline.retrieval import index as indexes
from pipeline.retrieval.arrays import Preparation
from pipeline.retrieval.index import Index
from pipeline.retrieval.index_kinds import Kind, check_kind, kind_for
from pipeline.retrieval.nearest import top_k
from pipeline.retrieval.recall import evaluate, tune
from pipeline.retrieval.search import Example, build_query, search
from pipeline.retrieval.store import FeatureStore
from schemas.errors import OutputError, SpecError

VECTORS = clustered(8000, 32, 60, seed=4, spread=1.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    vectors = VECTORS.copy()
    vectors[11] = np.nan
    return FeatureStore.open(str(write_run(tmp_path_factory.mktemp("run"), RunContent({"cls": vectors}, parts=4))))


@pytest.mark.parametrize("kind", ["flat", "ivf-flat", "ivf-pq", "hnsw"])
@pytest.mark.parametrize("centre", [False, True])
def test_recall_of_each_kind_and_back_from_disk(store: FeatureStore, kind: Kind, centre: bool) -> None:
    matrix = store.load("cls")
    name = f"{kind}-{centre}"
    built = tune(indexes.build(store, feature="cls", kind=kind, centre=centre), matrix)
    indexes.save(store, built, name)
    loaded = indexes.load(store, name)
    assert loaded.record == built.record
    assert loaded.record.rows == 7999
    assert (loaded.record.mean is not None) == centre
    found = evaluate(loaded, matrix, queries=100)
    assert found["recall_at_10"] >= 0.95
    np.testing.assert_array_equal(np.sort(indexes.stored_rows(loaded)), np.delete(np.arange(8000), 11))
    queries = loaded.prepare.apply(VECTORS[:5])
    scores, positions = indexes.find(loaded, matrix, queries, 1)
    np.testing.assert_array_equal(positions[:, 0], np.arange(5))
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-4)


@pytest.mark.parametrize("normalise", [True, False])
def test_copies_of_a_picture_are_no_misses(tmp_path: Path, normalise: bool) -> None:
    """Any ten of thirty copies are the nearest; which of them are found differs from search to search."""
    vectors = VECTORS[:3000].copy()
    vectors[:2400] = np.repeat(VECTORS[:80], 30, axis=0)
    store = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": vectors}))))
    matrix = store.load("cls")
    flat = indexes.build(store, feature="cls", kind="flat", normalise=normalise)
    assert evaluate(flat, matrix)["recall_at_10"] == 1
    lists = indexes.build(store, feature="cls", kind="ivf-flat", normalise=normalise)
    tuned = tune(lists, matrix)
    assert tuned.record.search == lists.record.search
    assert (tuned.record.recall_at_10 or 0) >= 0.97
    narrow = Index(lists.faiss, lists.record.model_copy(update={"search": {"nprobe": 1}}))
    assert evaluate(narrow, matrix)["recall_at_10"] < 0.97


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_an_index_of_one_vector_misses_nothing(tmp_path: Path, kind: Kind) -> None:
    vectors = np.zeros((3, 8), np.float32)
    vectors[1] = 1
    store = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": vectors}))))
    built = tune(indexes.build(store, feature="cls", kind=kind), store.load("cls"))
    assert built.record.recall_at_10 == 1
    assert built.record.search.get("efSearch", 64) == 64
    assert evaluate(built, store.load("cls"))["recall_at_10"] == 1


def test_without_normalisation_scores_are_inner_products(store: FeatureStore) -> None:
    built = indexes.build(store, feature="cls", kind="flat", normalise=False)
    exact = top_k(store.load("cls"), VECTORS[:3], 4, prepare=Preparation(normalise=False))
    found = indexes.find(built, store.load("cls"), VECTORS[:3], 4)
    np.testing.assert_array_equal(found[1], exact[1])
    np.testing.assert_allclose(found[0], exact[0], rtol=1e-5)


def test_search_through_an_index_gives_what_exact_search_gives(store: FeatureStore) -> None:
    built = tune(indexes.build(store, feature="cls", kind="ivf-flat"), store.load("cls"))
    query = build_query(store, "cls", [Example("row", "77")], None, built.prepare)
    by_index = search(store, query, 5, finder=lambda queries, k: indexes.find(built, store.load("cls"), queries, k))
    exact = search(store, query, 5)
    assert [hit["row"] for hit in by_index][:3] == [hit["row"] for hit in exact][:3]
    assert [hit["score"] for hit in by_index][:3] == pytest.approx([hit["score"] for hit in exact][:3], abs=1e-5)
    with pytest.raises(SpecError, match="--filter and --index"):
        search(store, query, 5, where="row > 3", finder=lambda queries, k: (queries, np.array([[1]])))


def test_an_index_that_finds_fewer_invents_none(store: FeatureStore) -> None:
    """faiss fills what it could not find in the lists that it looked through with -1."""
    built = tune(indexes.build(store, feature="cls", kind="ivf-flat"), store.load("cls"))
    query = build_query(store, "cls", [Example("row", "77")], None, built.prepare)
    usable = int(store.load("cls").usable.sum())
    hits = search(store, query, usable, finder=lambda queries, k: indexes.find(built, store.load("cls"), queries, k))
    rows = [hit["row"] for hit in hits]
    assert len(set(rows)) == len(rows) < usable
    assert min(hit["score"] for hit in hits) > -1


def test_kind_follows_size() -> None:
    assert kind_for(5000, 1024) == "flat"
    assert kind_for(1_000_000, 384) == "ivf-flat"
    assert kind_for(50_000_000, 1024) == "ivf-pq"
    with pytest.raises(SpecError, match="--kind lsh: choose one of flat, ivf-flat, ivf-pq, hnsw"):
        check_kind("lsh")


def test_stale_is_refused_and_update_adds(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", RunContent({"cls": VECTORS[:2000]}, parts=4))
    kept = sorted((whole / "images").glob("*.parquet"))
    late = kept[-1].read_bytes()
    kept[-1].unlink()
    store = FeatureStore.open(str(whole))
    indexes.save(store, indexes.build(store, feature="cls", kind="ivf-flat"), "main")
    assert indexes.load(store, "main").record.rows == 1500

    kept[-1].write_bytes(late)
    grown = FeatureStore.open(str(whole))
    with pytest.raises(OutputError, match=r"index `main` is stale: 1 parts were added and 0 removed.*--update"):
        indexes.load(grown, "main")
    updated, added = indexes.update(grown, "main")
    assert added == 500
    indexes.save(grown, updated, "main")
    np.testing.assert_array_equal(np.sort(indexes.stored_rows(indexes.load(grown, "main"))), np.arange(2000))

    kept[0].unlink()
    shrunk = FeatureStore.open(str(whole))
    rebuilt, _ = indexes.update(shrunk, "main")
    np.testing.assert_array_equal(np.sort(indexes.stored_rows(rebuilt)), np.arange(500, 2000))


def test_update_after_compaction_adds_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RunContent({"cls": VECTORS[:1000]}, parts=4))
    store = FeatureStore.open(str(run))
    indexes.save(store, indexes.build(store, feature="cls", kind="flat"), "main")
    for part in (run / "images").glob("*.parquet"):
        part.unlink()
    write_run(run, RunContent({"cls": VECTORS[:1000]}, parts=1))
    assert indexes.update(FeatureStore.open(str(run)), "main")[1] == 0


def test_index_of_another_model_or_name(tmp_path: Path) -> None:
    run = write_run(tmp_path, RunContent({"cls": VECTORS[:100]}))
    store = FeatureStore.open(str(run))
    indexes.save(store, indexes.build(store, feature="cls", kind=None), "main")
    with pytest.raises(OutputError, match=r"no index `other` .*\(there: main\)"):
        indexes.load(store, "other")
    path = run / "index" / "main" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_digest": "f" * 64}))
    with pytest.raises(OutputError, match="another model"):
        indexes.load(store, "main")


def test_index_of_another_run_with_the_same_parts_is_stale_and_built_anew(tmp_path: Path) -> None:
    run = write_run(tmp_path, RunContent({"cls": VECTORS[:100]}))
    store = FeatureStore.open(str(run))
    indexes.save(store, indexes.build(store, feature="cls", kind="flat"), "main")
    write_run(run, RunContent({"cls": -VECTORS[:100]}))
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"run_id": "another"}))
    again = FeatureStore.open(str(run))
    # As a run leaves them, which does not compress vectors: of the same size.
    again.parts = store.parts
    with pytest.raises(OutputError, match=r"stale: it was built from the vectors of another run.*--update"):
        indexes.load(again, "main")
    updated, added = indexes.update(again, "main")
    assert added == 100
    indexes.save(again, updated, "main")
    loaded = indexes.load(again, "main")
    np.testing.assert_allclose(loaded.faiss.reconstruct(7), loaded.prepare.apply(-VECTORS[7:8])[0], atol=1e-6)


def test_nothing_to_index_and_too_few_for_codes(tmp_path: Path) -> None:
    store = FeatureStore.open(str(write_run(tmp_path / "zeros", RunContent({"cls": np.zeros((4, 8), np.float32)}))))
    with pytest.raises(OutputError, match="no usable vector: all 4"):
        indexes.build(store, feature="cls", kind=None)
    store = FeatureStore.open(str(write_run(tmp_path / "few", RunContent({"cls": VECTORS[:100]}))))
    with pytest.raises(SpecError, match="ivf-pq: needs at least 256 vectors"):
        indexes.build(store, feature="cls", kind="ivf-pq")


@pytest.mark.parametrize("harm", ["cut", "gone", "other", "record"])
def test_a_damaged_index_is_explained(tmp_path: Path, harm: str) -> None:
    store = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": VECTORS[:100]}))))
    indexes.save(store, indexes.build(store, feature="cls", kind="flat"), "main")
    path = tmp_path / "index" / "main" / "vectors.faiss"
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    elif harm == "gone":
        path.unlink()
    elif harm == "other":
        fewer = FeatureStore.open(str(write_run(tmp_path / "few", RunContent({"cls": VECTORS[:90]}))))
        indexes.save(fewer, indexes.build(fewer, feature="cls", kind="flat"), "main")
        path.write_bytes((tmp_path / "few" / "index" / "main" / "vectors.faiss").read_bytes())
    else:
        (path.parent / "index.json").write_text('{"kind": "fl')
    with pytest.raises(OutputError, match="index `main` is damaged or being rebuilt; run `patchstream index DIR"):
        indexes.load(store, "main")
