"""A run whose parts are put in the place of others while a command reads it, or when that was cut short."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from support.runs import RunContent, clustered, write_run

from pipeline.retrieval import duplicates, parts, sql
from pipeline.retrieval.arrays import Preparation
from pipeline.retrieval.clusters import write_clusters
from pipeline.retrieval.duplicates import find_duplicates, write_duplicates
from pipeline.retrieval.kmeans import fit
from pipeline.retrieval.lloyd import ArraySource
from pipeline.retrieval.search import Example, Query, build_query, search
from pipeline.retrieval.store import FeatureStore
from pipeline.sinks import compaction
from schemas.errors import OutputError, SpecError

VECTORS = clustered(210, 16, 4, spread=0.3)


def content(rows: int, **more: object) -> RunContent:
    user = {"kind": [f"k{row % 3}" for row in range(rows)]}
    digests = [f"{row % 190:064x}" for row in range(rows)]
    return RunContent({"cls": VECTORS[:rows]}, user=user, sha256=digests, **{"parts": 5, **more})  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", content(200))


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "file":
        yield str(run)
        return
    monkeypatch.setenv("XDG_CACHE_HOME", str(run.parent / "cache"))
    memory, base = fsspec.filesystem("memory"), f"/compacted-{os.getpid()}"
    memory.put(str(run), base, recursive=True)
    yield f"memory:/{base}"
    memory.rm(base, recursive=True)


def compact(url: str) -> None:
    assert compaction.compact(url, 1 << 30, {}) == 5


def questions(out: Path) -> list[Callable[[FeatureStore], object]]:
    def query(store: FeatureStore, kind: Literal["row", "uri"], value: str) -> Query:
        return build_query(store, "cls", [Example(kind, value)], None, Preparation())

    return [
        lambda store: search(store, query(store, "row", "3"), 5),
        lambda store: search(store, query(store, "row", "3"), 5, where="row > 9"),
        lambda store: query(store, "uri", "memory://photo-0000007.jpg").rows.tolist(),
        lambda store: find_duplicates(store, exact_only=True).row.tolist(),
        lambda store: find_duplicates(store, 0.99).row.tolist(),
        lambda store: sql.write(store, "SELECT row FROM images", str(out / "rows.parquet")),
        lambda store: sql.ask(store, "SELECT count(*) AS n FROM images", 1).table.to_pylist(),
        lambda store: sorted(store.rows("kind = 'k1'").tolist()),
    ]


def test_answers_are_the_same_after_a_compaction(url: str, tmp_path: Path) -> None:
    asked = questions(tmp_path)
    before = [ask(FeatureStore.open(url)) for ask in asked]
    stores = [FeatureStore.open(url) for _ in asked]
    compact(url)
    assert [ask(store) for ask, store in zip(asked, stores, strict=True)] == before
    with pytest.raises(SpecError, match="in: SELEC"):
        stores[0].sql("SELEC")
    with pytest.raises(OutputError, match="cannot read"):
        stores[0].table(["row"])  # in the order of parts that are gone


def test_results_of_long_commands_outlive_a_compaction(run: Path) -> None:
    store = FeatureStore.open(str(run))
    found = find_duplicates(store, 0.99)
    clustering = fit(ArraySource(VECTORS[:200]), 4, spherical=True, restarts=1)
    compacted: list[str] = []

    def compact_then(what: str, *_: int) -> None:
        if what == "writing clusters" and not compacted:
            compacted.append(what)
            compact(str(run))

    store.progress = compact_then
    summary = write_clusters(store, store.load("cls"), Preparation(), clustering, "n", {"label_column": "kind"})
    assert compacted
    assert all(item["medoid"] and item["labels"] for item in summary["clusters"])
    assert write_duplicates(store, found, "main", {})["to_delete"] >= 10


def test_rows_that_came_meanwhile_take_no_part(run: Path) -> None:
    store = FeatureStore.open(str(run))
    store.load("cls")
    for part in (run / "images").iterdir():
        part.unlink()
    write_run(run, content(210, parts=1))
    assert max(find_duplicates(store, 0.999).row) < 200
    query = build_query(store, "cls", [Example("row", "3")], None, Preparation())
    assert all(190 < hit["row"] < 200 for hit in search(store, query, 5, where="row > 190"))


def update(run: Path, gone: list[int]) -> None:
    """What an update leaves: ten new rows, without those that they replace."""
    for part in (run / "images").iterdir():
        part.unlink()
    images = np.setdiff1d(np.arange(210), gone)
    digests = [f"{row % 190:064x}" for row in images]
    failed = dict.fromkeys(gone, "Replaced")
    kinds = [f"k{row % 3}" for row in range(210)]
    changed = RunContent({"cls": VECTORS[images]}, user={"kind": kinds}, sha256=digests, failed=failed)
    write_run(run, changed)


@pytest.mark.parametrize("exact_only", [False, True])
def test_rows_that_an_update_replaced_meanwhile_are_in_no_group(
    run: Path, monkeypatch: pytest.MonkeyPatch, exact_only: bool
) -> None:
    store = FeatureStore.open(str(run))
    before = find_duplicates(store, 0.9999, exact_only=exact_only)
    assert sorted(before.row) == [*range(10), *range(190, 200)]
    same_bytes = duplicates.same_bytes

    def then_update(*arguments: Any) -> Any:
        found = same_bytes(*arguments)
        update(run, [2, 197])
        return found

    monkeypatch.setattr(duplicates, "same_bytes", then_update)
    found = find_duplicates(store, 0.9999, exact_only=exact_only)
    assert sorted(found.row) == sorted({*range(10), *range(190, 200)} - {2, 192, 7, 197})
    assert found.groups == 8


def test_clusters_whose_medoid_is_replaced_meanwhile_go_without(run: Path) -> None:
    store = FeatureStore.open(str(run))
    clustering = fit(ArraySource(VECTORS[:200]), 4, spherical=True, restarts=1)
    matrix = store.load("cls")
    before = write_clusters(store, matrix, Preparation(), clustering, "n", {"label_column": "kind"})["clusters"]
    update(run, [before[1]["medoid"]["row"]])
    after = write_clusters(store, matrix, Preparation(), clustering, "n", {"label_column": "kind"})["clusters"]
    assert [item["medoid"] for item in after] == [before[0]["medoid"], None, before[2]["medoid"], before[3]["medoid"]]
    assert [item["size"] for item in after] == [item["size"] for item in before]


def test_another_run_in_its_place_is_not_mixed_in(run: Path) -> None:
    store = FeatureStore.open(str(run))
    for part in (run / "images").iterdir():
        part.unlink()
    write_run(run, content(180, parts=1))
    with pytest.raises(OutputError, match="became another while it was read; run the command again"):
        store.uris(np.array([3]))


def pair_bytes(run: Path) -> int:
    """A size to which two parts are brought, not all."""
    return 2 * max(part.stat().st_size for part in (run / "images").iterdir()) + 100


def cut_short(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap that dies after it deleted the old parts."""

    def die(fs: object, out: str, old: list[str], staged: list[str]) -> None:
        for name in old:
            Path(out, name).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(compaction, "_replace", die)
        with pytest.raises(KeyboardInterrupt):
            compaction.compact(str(run), pair_bytes(run), {})


def test_a_swap_that_was_cut_short_is_refused_until_it_is_finished(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_short(run, monkeypatch)
    assert sum(pq.read_metadata(part).num_rows for part in (run / "images").iterdir()) < 200
    monkeypatch.setattr("pipeline.settled._SWAP_S", 0.3)
    with pytest.raises(OutputError, match=r"are being rewritten[\s\S]*`patchstream compact DIR` finishes"):
        FeatureStore.open(str(run))
    compaction.recover(str(run), {})
    assert len(FeatureStore.open(str(run))) == 200


def test_a_swap_under_way_is_waited_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore.open(str(run))
    cut_short(run, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda _: compaction.recover(str(run), {}))
    assert store.uris(np.array([3, 199])) == ["memory://photo-0000003.jpg", "memory://photo-0000199.jpg"]
    assert len(FeatureStore.open(str(run))) == 200


@pytest.mark.parametrize("at", [1, 2])
def test_a_swap_begun_and_ended_between_two_looks_hides_no_row(
    run: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """It stands half done while the parts are listed for the `at`-th time, and is done before they are read."""
    half_done, go_on, listings = threading.Event(), threading.Event(), []
    move, list_parquet = compaction._move, parts.list_parquet

    def moved(*arguments: Any) -> None:
        half_done.set()
        assert go_on.wait(30)
        move(*arguments)

    def listed(*arguments: Any) -> list[tuple[str, int]]:
        listings.append(arguments)
        if len(listings) != at:
            return list_parquet(*arguments)
        swap.start()
        assert half_done.wait(30)
        found = list_parquet(*arguments)
        go_on.set()
        swap.join()
        return found

    swap = threading.Thread(target=lambda: compaction.compact(str(run), pair_bytes(run), {}))
    monkeypatch.setattr(compaction, "_move", moved)
    monkeypatch.setattr(parts, "list_parquet", listed)
    assert len(FeatureStore.open(str(run))) == 200
    assert not swap.is_alive()


def test_parts_that_go_while_their_footers_are_read_are_listed_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, begun = parts._footer, threading.Lock()

    def compacted_first(*arguments: Any) -> Any:
        with begun:
            if compaction.compact(url, 1 << 30, {}):
                swaps.append(url)
        return read(*arguments)

    swaps: list[str] = []
    monkeypatch.setattr(parts, "_footer", compacted_first)
    assert len(FeatureStore.open(url)) == 200
    assert swaps == [url]


def test_a_part_that_cannot_be_read_is_told_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "images" / "zz.parquet").write_bytes(b"half")
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(OutputError, match=r"zz\.parquet is not a Parquet file"):
        FeatureStore.open(str(run))
