"""Duplicates: the same bytes, near vectors, groups, what is kept and what may be deleted."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from support.runs import RunContent, clustered, write_run

from pipeline.retrieval import pairs as pairs_module
from pipeline.retrieval.arrays import Preparation, no_progress, unit
from pipeline.retrieval.components import Components
from pipeline.retrieval.duplicates import _hashes, find_duplicates, write_duplicates
from pipeline.retrieval.pairs import near_pairs
from pipeline.retrieval.store import FeatureStore
from pipeline.retrieval.thresholds import pairs_around
from schemas.errors import SpecError


def at_cosine(vectors: np.ndarray, cosine: float, seed: int = 0) -> np.ndarray:
    """Unit vectors with exactly this cosine to those given."""
    base = unit(vectors)
    noise = np.random.default_rng(seed).standard_normal(vectors.shape).astype(np.float32)
    noise = unit(noise - (noise * base).sum(axis=1, keepdims=True) * base)
    return (cosine * base + np.sqrt(1 - cosine**2) * noise).astype(np.float32)


def open_run(folder: Path, content: RunContent) -> FeatureStore:
    return FeatureStore.open(str(write_run(folder, content)))


def test_groups_of_same_bytes_and_near_vectors(tmp_path: Path) -> None:
    base = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    near = at_cosine(base[10:15], 0.95)
    far = at_cosine(base[20:25], 0.80, seed=1)
    # 50 and 51 have the bytes of row 0; their vectors are of no use, which must not matter.
    vectors = np.concatenate([base, near, far, np.zeros((2, 64), np.float32)])
    digests = [f"{row:064x}" for row in range(50)] + [f"{0:064x}"] * 2
    found = find_duplicates(open_run(tmp_path, RunContent({"cls": vectors}, sha256=digests)), 0.9)
    groups = {}
    for row, group in zip(found.row.tolist(), found.group.tolist(), strict=True):
        groups.setdefault(group, set()).add(row)
    assert list(groups.values()) == [{0, 50, 51}, *({10 + i, 40 + i} for i in range(5))]
    assert found.score[found.row == 51] == 1
    np.testing.assert_allclose(found.score[found.row == 42], 0.95, atol=1e-5)
    assert found.keep.sum() == found.groups == 6


def test_largest_picture_is_kept_ties_by_row(tmp_path: Path) -> None:
    vectors = np.repeat(np.eye(3, 8, dtype=np.float32), 3, axis=0)
    sizes = [(10, 10), (30, 10), (20, 10), (5, 5), (5, 5), (5, 5), (9, 9), (8, 10), (1, 81)]
    found = find_duplicates(open_run(tmp_path, RunContent({"cls": vectors}, sizes=sizes)), 0.9)
    assert found.row[found.keep].tolist() == [1, 3, 6]


def test_chains_join_and_scores_are_to_the_kept(tmp_path: Path) -> None:
    angles = np.arccos(0.9) * np.arange(4)
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = find_duplicates(open_run(tmp_path, RunContent({"cls": vectors}, parts=1)), 0.899)
    assert found.groups == 1
    np.testing.assert_allclose(found.score, np.cos(angles), atol=1e-5)


def test_lists_find_what_all_pairs_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = clustered(6000, 64, 40, seed=2, spread=1.0)
    vectors = np.concatenate([base, at_cosine(base[:600], 0.9, seed=3)])
    matrix = open_run(tmp_path, RunContent({"cls": vectors})).load("cls")
    positions = np.flatnonzero(matrix.usable)

    def found(limit: int) -> list[tuple[int, int]]:
        monkeypatch.setattr(pairs_module, "ALL_PAIRS", limit)
        blocks = list(near_pairs(matrix, positions, 0.88, Preparation(), no_progress))
        first = np.concatenate([block.first for block in blocks])
        second = np.concatenate([block.second for block in blocks])
        assert (first < second).all()
        return list(zip(first.tolist(), second.tolist(), strict=True))

    everything, listed = found(10_000), found(100)
    assert len(set(everything)) == len(everything)
    assert len(set(listed)) == len(listed), "a pair came twice"
    assert set(listed) <= set(everything)
    planted = {(row, 6000 + row) for row in range(600)}
    assert planted <= set(everything)
    assert len(planted & set(listed)) >= 0.99 * len(planted)


def test_many_equal_vectors_cost_little(tmp_path: Path) -> None:
    vectors = np.ones((60_000, 8), np.float32)
    vectors[::2] = np.arange(1, 9)
    found = find_duplicates(open_run(tmp_path, RunContent({"cls": vectors})), 0.99)
    assert found.groups == 2
    assert len(found.row) == 60_000


def test_equal_hashes_do_not_make_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Values of bfloat16, whose weighted sums modulo 2^64 were equal.
    vectors = np.array(
        [
            [1.40625, 0.396484375, -0.08544921875, 0.93359375, -1.3828125, -0.6484375],
            [-0.55078125, -0.3515625, -2.234375, 1.4140625, 1.46875, 0.435546875],
            [5, 1, 0, 0, 0, 0],
            [-0.55078125, -0.3515625, -2.234375, 1.4140625, 1.46875, 0.435546875],
        ],
        np.float32,
    )
    store = open_run(tmp_path, RunContent({"cls": vectors}))
    assert find_duplicates(store, 0.88).row.tolist() == [1, 3]
    monkeypatch.setattr("pipeline.retrieval.duplicates._hashes", lambda matrix: np.zeros(4, np.uint64))
    assert find_duplicates(store, 0.88).row.tolist() == [1, 3]


def test_hashes_of_16_bit_numbers_use_all_bits(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((512, 4)).astype(np.float16)
    hashes = _hashes(open_run(tmp_path, RunContent({"cls": vectors})).load("cls"))
    assert all(0 < np.count_nonzero(hashes >> np.uint64(bit) & np.uint64(1)) < 512 for bit in range(64))


def test_exact_only_and_threshold_one(tmp_path: Path) -> None:
    base = np.random.default_rng(0).standard_normal((10, 16)).astype(np.float32)
    vectors = np.concatenate([base, at_cosine(base[:2], 0.999)])
    digests = [f"{row % 11:064x}" for row in range(12)]
    store = open_run(tmp_path, RunContent({"cls": vectors}, sha256=digests))
    assert find_duplicates(store, 0.99, exact_only=True).row.tolist() == [0, 11]
    for bad in (0.0, 1.01, float("nan")):
        with pytest.raises(SpecError, match="--threshold"):
            find_duplicates(store, bad)


def test_replaced_versions_are_no_duplicates(tmp_path: Path) -> None:
    vectors = np.eye(6, dtype=np.float32)
    vectors[5] = vectors[2]
    digests = [f"{row:064x}" for row in (0, 1, 2, 3, 4, 2)]
    uris = ["a", "b", "c", "d", "e", "c"]
    content = RunContent({"cls": vectors}, sha256=digests, uris=uris, replaces={5: 2})
    assert find_duplicates(open_run(tmp_path, content), 0.9).groups == 0


def test_files_and_delete_list(tmp_path: Path) -> None:
    vectors = np.repeat(np.eye(3, 4, dtype=np.float32), 2, axis=0)
    # The second pair is one file listed twice; the last name would smuggle another line into the list.
    uris = ["a.jpg", "b.jpg", "c.jpg", "c.jpg", "e.jpg", "x\n/etc/passwd"]
    store = open_run(tmp_path, RunContent({"cls": vectors}, uris=uris))
    summary = write_duplicates(store, find_duplicates(store, 0.9), "first", {"threshold": 0.9})
    folder = tmp_path / "duplicates" / "first"
    table = pq.read_table(folder)
    assert table.schema.names == ["row", "group", "keep", "score"]
    assert table.column("keep").to_pylist() == [True, False] * 3
    assert (tmp_path / "duplicates" / "first.delete.txt").read_text() == "b.jpg\n"
    assert summary == json.loads((tmp_path / "duplicates" / "first.json").read_text())
    assert summary["not_listed_because_kept_elsewhere"] == 1
    assert summary["not_listed_because_of_line_breaks"] == 1
    assert store.sql("SELECT count(*) AS n FROM duplicates_first WHERE keep").to_pylist() == [{"n": 3}]


def test_odd_but_whole_addresses_are_listed(tmp_path: Path) -> None:
    # A macOS screenshot, CJK and no-break blanks, joined emoji; then all that some reader takes for the end of a line.
    whole = ["Shot 9.41\u202fAM.png", "a\u3000b.png", "a\u00a0b.png", "\U0001f468\u200d\U0001f469.png"]
    broken = [f"x{end}y.png" for end in "\n\r\x0b\x0c\x85\u2028\0"] + ["x.png\n"]
    uris = ["kept.png", *whole, *broken]
    vectors = np.ones((len(uris), 4), np.float32)
    store = open_run(tmp_path, RunContent({"cls": vectors}, uris=uris))
    summary = write_duplicates(store, find_duplicates(store), "odd", {})
    listed = (tmp_path / "duplicates" / "odd.delete.txt").read_bytes().decode()
    assert listed == "".join(f"{uri}\n" for uri in whole)
    assert summary["not_listed_because_of_line_breaks"] == len(broken)


@pytest.mark.parametrize("feature", ["pooled", "visual_tokens"])
def test_same_bytes_without_cls(tmp_path: Path, feature: str) -> None:
    digests = [f"{row % 4:064x}" for row in range(6)]
    sizes = [(5, 5)] * 5 + [(9, 9)]
    content = RunContent({feature: np.zeros((7, 3), np.int32)}, sha256=[*digests, "f" * 64], sizes=[*sizes, (5, 5)])
    found = find_duplicates(open_run(tmp_path, content), exact_only=True)
    assert found.row.tolist() == [0, 4, 5, 1]
    assert found.group.tolist() == [0, 0, 1, 1]
    assert found.keep.tolist() == [True, False] * 2
    assert found.score.tolist() == [1.0] * 4
    assert found.exact.all()


def test_what_is_grouped_is_held_in_columns(tmp_path: Path) -> None:
    count = 40_000
    content = RunContent({"cls": np.ones((count, 2), np.float32)}, sha256=[f"{row % 9:064x}" for row in range(count)])
    store = open_run(tmp_path, content)
    tracemalloc.start()
    try:
        found = find_duplicates(store, exact_only=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.groups == 9
    assert found.uri[-1].as_py() == f"memory://photo-{found.row[-1]:07d}.jpg"
    assert peak < 250 * count


def test_rows_without_digest_or_size(tmp_path: Path) -> None:
    vectors = np.repeat(np.eye(2, 4, dtype=np.float32), 3, axis=0)
    run = write_run(tmp_path, RunContent({"cls": vectors}, sha256=["a" * 64, "b" * 64, "a" * 64, *"cde"], parts=1))
    (part,) = (run / "images").iterdir()
    table = pq.read_table(part)
    for name, gone in (("sha256", [3, 4]), ("width", [0, 3])):
        column = pc.if_else(pc.is_in(table["row"], pa.array(gone)), None, table[name])
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    pq.write_table(table, part)
    found = find_duplicates(FeatureStore.open(str(run)), 0.9)
    assert found.row.tolist() == [1, 0, 2, 4, 3, 5]
    assert found.exact.tolist() == [True, False, False, True, False, False]


def test_nothing_found_is_an_empty_table(tmp_path: Path) -> None:
    store = open_run(tmp_path, RunContent({"cls": np.eye(5, dtype=np.float32)}))
    assert write_duplicates(store, find_duplicates(store), "none", {})["groups"] == 0
    assert pq.read_table(tmp_path / "duplicates" / "none").num_rows == 0
    with pytest.raises(SpecError, match="--name"):
        write_duplicates(store, find_duplicates(store), "../x", {})


def test_bands_around_a_threshold(tmp_path: Path) -> None:
    base = np.random.default_rng(0).standard_normal((100, 256)).astype(np.float32)
    copies = [at_cosine(base, cosine, seed=round(1000 * cosine)) for cosine in (0.915, 0.885)]
    bands = pairs_around(open_run(tmp_path, RunContent({"cls": np.concatenate([base, *copies])})), 0.9)
    counts = {round(band.low, 2): band.pairs for band in bands}
    assert counts[0.91] == 100
    assert counts[0.88] == 100
    assert counts[0.92] == counts[0.93] == 0
    shown = next(band.examples for band in bands if round(band.low, 2) == 0.91)
    assert len(shown) == 4
    assert all(other == row + 100 for row, other, _ in shown)


def test_examples_of_many_copies_are_drawn_by_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_run(tmp_path, RunContent({"cls": np.ones((600, 8), np.float32)}))
    other = pairs_around(store, 0.97, seed=1)[0]
    calls: list[str] = []

    class Counted:
        def __init__(self, rng: np.random.Generator) -> None:
            self._rng = rng

        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(self._rng, name)

    made = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Counted(made(seed)))
    top = pairs_around(store, 0.97)[0]
    assert top.pairs == other.pairs == 600 * 599 // 2
    assert len(set(top.examples)) == 4
    assert top.examples != other.examples
    assert len(calls) == 1


@pytest.mark.parametrize("threshold", [0.94, 0.95, 0.955, 0.97, 1.0])
def test_the_top_band_holds_the_copies(tmp_path: Path, threshold: float) -> None:
    base = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    vectors = np.concatenate([base, base, at_cosine(base, 0.985, seed=1)])
    bands = pairs_around(open_run(tmp_path, RunContent({"cls": vectors})), threshold)
    assert all(band.low < band.high <= 1 for band in bands)
    # Below 0.95 the ten bands end before 1.
    assert bands[0].high == pytest.approx(min(1, threshold + 0.05))
    assert sum(band.pairs for band in bands) == (150 if bands[0].high == 1 else 100)
    assert bands[0].pairs >= (50 if bands[0].high == 1 else 0)


def test_components_contract_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.retrieval.components._BUFFERED_EDGES", 3)
    joined = Components(10)
    for first, second in [(0, 1), (2, 3), (4, 5), (1, 2), (8, 9), (5, 8), (6, 6)]:
        joined.join(np.array([first]), np.array([second]))
    labels = joined.labels()
    assert [np.flatnonzero(labels == label).tolist() for label in dict.fromkeys(labels.tolist())] == [
        [0, 1, 2, 3],
        [4, 5, 8, 9],
        [6],
        [7],
    ]
