"""FeatureStore: what it reads, in which order, and what it refuses."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.runs import RunContent, run_record, write_run

from pipeline.retrieval.store import FeatureStore
from schemas.errors import OutputError, SpecError
from schemas.tables import METADATA_KEY


@pytest.fixture
def content() -> RunContent:
    rng = np.random.default_rng(1)
    names = ["tench", "kite", "it's"]
    return RunContent(
        features={"cls": rng.standard_normal((90, 8), dtype=np.float32), "pooled": np.ones((90, 4), np.float16)},
        labels=[[(row % 3, names[row % 3], 0.9), (3, "other", 0.1)] for row in range(90)],
        user={"shop": [f"s{row % 4}" for row in range(93)]},
        failed={3: "Truncated", 40: "NotFound", 92: "Truncated"},
        parts=3,
    )


@pytest.fixture
def run(tmp_path: Path, content: RunContent) -> Path:
    return write_run(tmp_path / "run", content)


def test_matrix_rows_and_table_go_together(run: Path, content: RunContent) -> None:
    store = FeatureStore.open(str(run))
    assert len(store) == 90
    assert store.features == {"cls": 8, "pooled": 4}
    rows = store.rows()
    assert 3 not in rows
    assert rows[-1] == 91
    matrix = store.matrix("cls")
    np.testing.assert_array_equal(matrix, content.features["cls"])
    np.testing.assert_array_equal(np.stack(store.to_pandas()["cls"].to_list()), matrix)
    assert store.table(["row", "shop"]).column("shop")[3].as_py() == f"s{rows[3] % 4}"


def test_matrix_is_a_map_of_one_file_made_once(run: Path) -> None:
    first = FeatureStore.open(str(run)).matrix("cls")
    assert isinstance(first, np.memmap)
    files = sorted((run / "index" / "_matrix").rglob("*.npy"))
    stamps = [file.stat().st_mtime_ns for file in files]
    FeatureStore.open(str(run)).matrix("cls")
    assert [file.stat().st_mtime_ns for file in sorted((run / "index" / "_matrix").rglob("*.npy"))] == stamps


def test_matrix_follows_the_parts(run: Path, content: RunContent) -> None:
    FeatureStore.open(str(run)).matrix("cls")
    last = sorted((run / "images").glob("*.parquet"))[-1]
    last.unlink()
    store = FeatureStore.open(str(run))
    assert store.matrix("cls").shape == (60, 8)
    assert len(list((run / "index" / "_matrix").glob("cls-*"))) == 1


@pytest.mark.parametrize(
    ("variable", "home"), [("XDG_CACHE_HOME", "cache/patchstream"), ("PATCHSTREAM_CACHE", "cache")]
)
def test_read_only_directory_uses_the_cache_folder(
    run: Path, tmp_path: Path, content: RunContent, monkeypatch: pytest.MonkeyPatch, variable: str, home: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.delenv("PATCHSTREAM_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    (run / "index").write_text("a file where the folder should be")
    matrix = FeatureStore.open(str(run)).matrix("cls")
    np.testing.assert_array_equal(matrix, content.features["cls"])
    assert list((tmp_path / home / "matrix").glob("*/cls-*"))


def test_a_matrix_is_there_for_everybody_who_may_read_the_run(run: Path) -> None:
    before = os.umask(0o022)
    try:
        FeatureStore.open(str(run)).matrix("cls")
    finally:
        os.umask(before)
    (folder,) = (run / "index" / "_matrix").glob("cls-*")
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_folder_called_like_a_column_is_no_column(tmp_path: Path, content: RunContent) -> None:
    """DuckDB would take `shop=x` in a path for a partition, and its value for that of every row."""
    store = FeatureStore.open(str(write_run(tmp_path / "shop=x" / "dt=2024-05-01" / "run", content)))
    found = store.sql("SELECT DISTINCT shop FROM images ORDER BY shop")
    assert found.column("shop").to_pylist() == ["s0", "s1", "s2", "s3"]
    assert "dt" not in store.sql("SELECT * FROM images LIMIT 1").column_names


def test_results_whose_names_differ_in_case_alone_are_two_views(run: Path) -> None:
    for name in ("A", "a"):
        (run / "clusters" / name).mkdir(parents=True)
        (run / "clusters" / f"{name}.json").write_text("{}")
        pq.write_table(pa.table({"row": [1], "cluster": [ord(name)]}), run / "clusters" / name / "part-0.parquet")
    store = FeatureStore.open(str(run))
    assert store.sql("SELECT cluster FROM clusters_A UNION ALL SELECT cluster FROM clusters_a_1").num_rows == 2


def test_a_result_named_as_the_view_of_another_keeps_its_name(run: Path) -> None:
    for number, name in enumerate(("A", "a", "a_1")):
        (run / "clusters" / name).mkdir(parents=True)
        (run / "clusters" / f"{name}.json").write_text("{}")
        pq.write_table(pa.table({"cluster": [number]}), run / "clusters" / name / "part-0.parquet")
    store = FeatureStore.open(str(run))
    for view, number in (("A", 0), ("a_1", 2), ("a_2", 1)):
        assert store.sql(f"SELECT * FROM clusters_{view}").to_pylist() == [{"cluster": number}]


def test_a_damaged_record_is_explained(run: Path) -> None:
    (run / "run.json").write_text("{")
    with pytest.raises(OutputError, match=r"run\.json is not a run record of this version"):
        FeatureStore.open(str(run))


def test_float16_stays_float16_and_streams_as_float32(run: Path) -> None:
    store = FeatureStore.open(str(run))
    assert store.matrix("pooled").dtype == np.float16
    batches = list(store.iter_features("pooled", batch_rows=7))
    assert {vectors.dtype for _, vectors in batches} == {np.dtype(np.float32)}
    assert max(len(rows) for rows, _ in batches) <= 7
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in batches]), store.rows())


def test_centred_and_normalised(run: Path, content: RunContent) -> None:
    matrix = FeatureStore.open(str(run)).matrix("cls", normalise=True, centre=True)
    expected = content.features["cls"] - content.features["cls"].mean(axis=0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(matrix, expected, atol=1e-6)


def test_filters_are_sql(run: Path) -> None:
    store = FeatureStore.open(str(run))
    chosen = store.table(where="labels[1].label = 'tench' AND shop = 's0'")
    assert chosen.num_rows > 0
    assert chosen.schema.field("cls").type == store.schema.field("cls").type
    assert set(chosen.column("shop").to_pylist()) == {"s0"}
    np.testing.assert_array_equal(store.rows("row < 5 -- a comment"), [0, 1, 2, 4])


def test_columns_that_differ_in_case_alone_are_told_apart(tmp_path: Path) -> None:
    mine = {"Format": ["raw", "jpg", "raw", "gif"], "Format_1": list("abcd"), "Row": [9, 8, 7, 6]}
    store = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": np.eye(4, dtype=np.float32)}, user=mine))))
    names = ["Row", "format", "Format", "Format_1"]
    found = store.table(names, "row >= 2")
    assert found.column_names == names
    assert [column.to_pylist() for column in found.columns] == [[7, 6], ["JPEG"] * 2, ["raw", "gif"], ["c", "d"]]
    assert found.equals(store.table(names).slice(2))
    assert store.sql(f'SELECT "{store.sql_name("Format")}" AS f FROM images').to_pydict() == {"f": mine["Format"]}


def test_sql_sees_all_tables(run: Path) -> None:
    store = FeatureStore.open(str(run))
    query = """SELECT count(*) AS n FROM manifest m
               LEFT JOIN images i USING (row) LEFT JOIN failures f USING (row)
               WHERE i.row IS NULL AND f.error = 'Truncated'"""
    assert store.sql(query).to_pylist() == [{"n": 2}]


def test_failures_view_exists_without_failures(tmp_path: Path) -> None:
    run = write_run(tmp_path, RunContent(features={"cls": np.ones((4, 2), np.float32)}, parts=1))
    assert FeatureStore.open(str(run)).sql("SELECT count(*) AS n FROM failures").to_pylist() == [{"n": 0}]


@pytest.mark.parametrize("bad", ["nonsense = 1", "labels[1].label = 'tench", "1=1) AND (nothing"])
def test_bad_filter_names_the_condition(run: Path, bad: str) -> None:
    with pytest.raises(SpecError, match=r"in: SELECT"):
        FeatureStore.open(str(run)).rows(bad)


def test_nan_zero_infinite_and_null_vectors_are_named(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
    vectors[2], vectors[5, 1], vectors[7, 0] = 0, np.nan, np.inf
    store = FeatureStore.open(str(write_run(tmp_path, RunContent(features={"cls": vectors}))))
    matrix = store.load("cls")
    np.testing.assert_array_equal(matrix.left_out, [2, 5, 7])
    kept = np.concatenate([positions for positions, _ in matrix.chunks(chunk_rows=3)])
    np.testing.assert_array_equal(kept, [0, 1, 3, 4, 6, 8, 9])
    assert np.isfinite(matrix.mean()).all()


def test_null_vector_reads_as_nan(run: Path) -> None:
    part = sorted((run / "images").glob("*.parquet"))[0]
    table = pq.read_table(part)
    values = table.column("cls").to_pylist()
    values[4] = None
    index = table.schema.get_field_index("cls")
    field = table.schema.field("cls")
    pq.write_table(table.set_column(index, field, pa.array(values, field.type)), part)
    store = FeatureStore.open(str(run))
    assert np.isnan(store.matrix("cls")[4]).all()
    np.testing.assert_array_equal(store.load("cls").left_out, [store.rows()[4]])


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 1000, 4096, 100_000])
def test_released_chunks_keep_their_content(tmp_path: Path, release: bool, chunk_rows: int) -> None:
    vectors = np.random.default_rng(0).standard_normal((9001, 24)).astype(np.float32)
    matrix = FeatureStore.open(str(write_run(tmp_path, RunContent(features={"cls": vectors})))).load("cls")
    if chunk_rows == 1:
        vectors, positions = vectors[::97], np.arange(0, 9001, 97)
        chunks = list(matrix.chunks(positions, release=release))
    else:
        chunks = [(at.copy(), block.copy()) for at, block in matrix.chunks(chunk_rows=chunk_rows, release=release)]
    np.testing.assert_array_equal(np.concatenate([block for _, block in chunks]), vectors)


def test_not_a_run_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(OutputError, match=r"no run\.json \(it holds: holiday\.jpg\)"):
        FeatureStore.open(str(tmp_path))
    with pytest.raises(OutputError, match="no such directory"):
        FeatureStore.open(str(tmp_path / "nowhere"))


def test_missing_feature_says_which_there_are(tmp_path: Path) -> None:
    run = write_run(tmp_path, RunContent(features={"pooled": np.ones((4, 2), np.float32)}))
    with pytest.raises(OutputError, match=r"no feature `cls`; it has: pooled \(2\)"):
        FeatureStore.open(str(run)).matrix("cls")


def test_run_without_parts(run: Path) -> None:
    for part in (run / "images").glob("*.parquet"):
        part.unlink()
    with pytest.raises(OutputError, match="no finished part yet"):
        FeatureStore.open(str(run))


def test_parts_of_two_models_are_refused(run: Path, content: RunContent) -> None:
    part = sorted((run / "images").glob("*.parquet"))[1]
    content.digest = "f" * 64
    foreign = pq.read_table(part).replace_schema_metadata({METADATA_KEY: run_record(content).part_metadata()})
    pq.write_table(foreign, part)
    with pytest.raises(OutputError, match=rf"{part.name} was computed by another model[\s\S]*model\.digest"):
        FeatureStore.open(str(run))


def test_hidden_and_foreign_files_are_not_parts(run: Path) -> None:
    (run / "images" / ".rows-1.parquet.abc.tmp").write_bytes(b"half")
    (run / "images" / ".half.parquet").write_bytes(b"half")
    (run / "images" / "notes.txt").write_text("hello")
    assert len(FeatureStore.open(str(run))) == 90


def test_run_on_another_store(run: Path, content: RunContent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any fsspec store will do; `memory` has no local paths, as an object store has none."""
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    base = f"/retrieval-{os.getpid()}"
    memory.put(str(run), base, recursive=True)
    try:
        store = FeatureStore.open(f"memory:/{base}")
        np.testing.assert_array_equal(store.matrix("cls"), content.features["cls"])
        assert store.sql("SELECT count(*) AS n FROM images WHERE shop = 's1'").to_pylist()[0]["n"] > 0
        assert store.uris(np.array([91]))[0].endswith("91.jpg")
    finally:
        memory.rm(base, recursive=True)


def test_unreadable_record(run: Path) -> None:
    (run / "run.json").write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(OutputError, match=r"run\.json is not a run record of this version"):
        FeatureStore.open(str(run))


def test_replaced_rows_do_not_take_part(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
    content = RunContent(features={"cls": vectors}, replaces={8: 1, 9: 2})
    matrix = FeatureStore.open(str(write_run(tmp_path, content))).load("cls")
    assert len(matrix.left_out) == 0
    np.testing.assert_array_equal(matrix.rows[matrix.usable], [0, 3, 4, 5, 6, 7, 8, 9])


def test_a_damaged_manifest_is_told_in_words(run: Path) -> None:
    (part,) = (run / "manifest").iterdir()
    part.write_bytes(b"PAR1")
    with pytest.raises(OutputError, match=rf"cannot read {run}/manifest, .*{part}.* put back a copy of it"):
        _ = FeatureStore.open(str(run)).replaced
