"""SQL: views, cosine, nearest, and results as files."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from support.commands import end, start
from support.runs import RunContent, write_run

from jobs.retrieve_screen import print_json
from pipeline.retrieval import sql
from pipeline.retrieval.duplicates import find_duplicates, write_duplicates
from pipeline.retrieval.query import temporary_folder
from pipeline.retrieval.store import FeatureStore
from schemas.errors import OutputError, SpecError

VECTORS = np.random.default_rng(8).standard_normal((200, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    vectors = VECTORS.copy()
    vectors[3], vectors[4] = 0, np.nan
    content = RunContent(
        {"cls": vectors, "pooled": vectors[:, ::-1][:, :6].astype(np.float16)},
        labels=[[(row % 2, ["tench", "kite"][row % 2], 0.5)] for row in range(200)],
        failed={200: "NotFound"},
        replaces={9: 8},
    )
    return FeatureStore.open(str(write_run(tmp_path_factory.mktemp("run"), content)))


def nearest_rows(row: int, k: int) -> list[int]:
    wide = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    scores = wide @ wide[row]
    scores[[row, 3, 4, 8]] = -2
    return np.argsort(-scores)[:k].tolist()


def test_nearest_and_cosine(store: FeatureStore) -> None:
    found = sql.ask(store, "SELECT * FROM nearest(17, 6)", 100).table
    assert found.schema.names == ["row", "uri", "score"]
    assert found.column("row").to_pylist() == nearest_rows(17, 6)
    query = "SELECT cosine(a.cls, b.cls) AS c FROM images a, images b WHERE a.row = 17 AND b.row = {}"
    same = sql.ask(store, query.format(found.column("row")[0]), 1).table.column("c")[0].as_py()
    assert same == pytest.approx(found.column("score")[0].as_py(), abs=1e-6)
    assert sql.ask(store, "SELECT * FROM nearest(3, 6)", 100).table.num_rows == 0
    assert sql.ask(store, "SELECT * FROM nearest(4, 6)", 100).table.num_rows == 0


def test_nearest_of_a_half_precision_feature(store: FeatureStore) -> None:
    found = sql.ask(store, "SELECT * FROM nearest_pooled(17, 3)", 100).table
    assert found.num_rows == 3
    assert max(found.column("score").to_pylist()) < 1


def test_nearest_joins_with_labels(store: FeatureStore) -> None:
    query = "SELECT n.row FROM nearest(17, 200) n JOIN images USING (row) WHERE labels[1].label = 'tench' LIMIT 5"
    rows = sql.ask(store, query, 100).table.column("row").to_pylist()
    assert len(rows) == 5
    assert all(row % 2 == 0 for row in rows)


def test_views_of_what_was_found(store: FeatureStore) -> None:
    write_duplicates(store, find_duplicates(store, 0.99), "first-try", {})
    assert sql.ask(store, 'SELECT count(*) AS n FROM "duplicates_first-try"', 1).table.num_rows == 1
    assert sql.ask(store, "SELECT error FROM failures", 9).table.to_pylist() == [{"error": "NotFound"}]
    assert sql.ask(store, "SELECT count(*) AS n FROM manifest", 9).table.to_pylist() == [{"n": 201}]


def test_more_rows_than_shown(store: FeatureStore) -> None:
    answer = sql.ask(store, "SELECT row FROM images", 50)
    assert (answer.table.num_rows, answer.more) == (50, True)
    assert not sql.ask(store, "SELECT row FROM images", 200).more


def test_results_as_files(store: FeatureStore, tmp_path: Path) -> None:
    query = "SELECT row, uri FROM images WHERE row < 7"
    assert sql.write(store, query, str(tmp_path / "o.parquet")) == 7
    assert pq.read_table(tmp_path / "o.parquet").column("row").to_pylist() == list(range(7))
    assert sql.write(store, query, str(tmp_path / "o.csv")) == 7
    assert pa.csv.read_csv(tmp_path / "o.csv").column("uri")[6].as_py().endswith("6.jpg")
    with pytest.raises(SpecError, match=r"ends in \.parquet or \.csv"):
        sql.write(store, query, str(tmp_path / "o.xlsx"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.csv", "o.parquet"]


@pytest.mark.parametrize("late", ["s3://b/a, b.jpg", 'x "y", \nz'])
def test_csv_with_a_rare_comma_or_line_break(store: FeatureStore, tmp_path: Path, late: str) -> None:
    # Beyond the rows that a reader of CSV looks at to guess how it is quoted.
    address = f"CASE WHEN range = 49000 THEN '{late}' ELSE 's3://b/plain.jpg' END"
    query = f"SELECT range AS row, {address} AS uri FROM range(50000)"
    assert sql.write(store, query, str(tmp_path / "it's.csv")) == 50_000
    with (tmp_path / "it's.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50_000
    assert rows[49_000] == {"row": "49000", "uri": late}


def test_every_connection_keeps_to_its_memory_and_folder(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`duplicates` and labels ask by `store.connect` too."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    setting = "SELECT current_setting('memory_limit'), current_setting('temp_directory')"
    with store.connect() as connection, sql.connect(store) as other:
        memory, folder = connection.sql(setting).fetchall()[0]
        assert memory == other.sql(setting).fetchall()[0][0] == "2.0 GiB"
        assert Path(folder).parent == tmp_path
        assert folder != other.sql(setting).fetchall()[0][1], "one of another user would be closed to us"
        connection.execute("SET threads = 1")
        connection.execute("SET memory_limit = '12MiB'")
        connection.execute("CREATE TABLE t AS SELECT hash(range)::VARCHAR AS h FROM range(300_000) ORDER BY h")
        assert [path.name for path in tmp_path.iterdir()] == [Path(folder).name]
    assert not list(tmp_path.iterdir())


def test_what_a_killed_command_left_in_temporary_files_goes_with_the_next(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spill = (
        "import sys, time; from pipeline.retrieval import store; store.MEMORY = '12MiB'\n"
        "connection = store.FeatureStore.open(sys.argv[1]).connect(); connection.execute('SET threads = 1')\n"
        "connection.execute('CREATE TABLE t AS SELECT hash(range)::VARCHAR AS h FROM range(300_000) ORDER BY h')\n"
        "print('spilled', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", spill, store.root], env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    with child, child.stdout as output:
        assert output.readline() == b"spilled\n"
        (left,) = tmp_path.iterdir()
        store.connect().close()
        assert list(left.iterdir()), "of a process at work"
        child.kill()
    elsewhere = tmp_path / re.sub(r"(duckdb-).*(-\d+-)", r"\1another-machine\2", left.name)
    elsewhere.mkdir()
    assert list(left.iterdir())
    store.connect().close()
    assert list(tmp_path.iterdir()) == [elsewhere]


def test_what_a_process_left_goes_though_nobody_has_asked_for_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie
    left = Path(temporary_folder().replace(f"-{os.getpid()}-", f"-{child.pid}-"))
    left.mkdir()
    temporary_folder()
    child.wait()
    assert not left.exists()


def test_a_run_of_which_every_image_failed(tmp_path: Path) -> None:
    """There are its failures to ask for; of what it has none, there are no rows."""
    content = RunContent(
        {"cls": VECTORS[:2], "pooled": VECTORS[:2].astype(np.float16)},
        labels=[[(0, "kite", 0.5)]] * 2,
        user={"shop": ["a", "a", "b"]},
        failed={2: "Denied"},
    )
    run = write_run(tmp_path / "run", content)
    of_some = sql.ask(FeatureStore.open(str(run)), "FROM images", 9).table
    for part in (run / "images").iterdir():
        part.unlink()
    with pytest.raises(OutputError, match="where it is over, all images failed, and `patchstream status DIR`"):
        FeatureStore.open(str(run))
    store = FeatureStore.open(str(run), all_failed=True)
    assert sql.ask(store, "SELECT error FROM failures", 9).table.to_pylist() == [{"error": "Denied"}]
    of_none = sql.ask(store, "FROM images", 9).table
    assert (of_none.column_names, of_none.num_rows) == (of_some.column_names, 0)
    assert sql.ask(store, "SELECT * FROM nearest_pooled(0, 3)", 9).table.num_rows == 0
    assert sql.write(store, "FROM images", str(tmp_path / "none.csv")) == 0
    for part in (run / "failures").iterdir():
        part.unlink()
    with pytest.raises(OutputError, match="no finished part yet"):
        FeatureStore.open(str(run), all_failed=True)


@pytest.mark.parametrize("query", ["SELECT nothing FROM images", "SELEC 1", "SELECT row FROM clusters_none"])
def test_bad_queries(store: FeatureStore, tmp_path: Path, query: str) -> None:
    with pytest.raises(SpecError, match="in: SELEC"):
        sql.ask(store, query, 10)
    with pytest.raises(SpecError, match="in: SELEC"):
        sql.write(store, query, str(tmp_path / "o.csv"))
    assert not list(tmp_path.iterdir())


def test_numbers_of_any_type_are_numbers_in_json(store: FeatureStore, capsys: pytest.CaptureFixture[str]) -> None:
    query = "SELECT sum(row) AS whole, 170141183460469231731687303715884105727 AS huge, 1.25 AS part FROM images"
    print_json(sql.ask(store, query, 1).table.to_pylist())
    assert json.loads(capsys.readouterr().out) == [{"whole": 200 * 199 // 2, "huge": 2**127 - 1, "part": 1.25}]


@pytest.mark.parametrize("out", ["", "sum.csv"])
@pytest.mark.parametrize("rows", ["sum(range)", "range"])
def test_interrupted_in_the_midst_of_a_query(store: FeatureStore, tmp_path: Path, rows: str, out: str) -> None:
    """DuckDB has an error of its own for that; adding up, it does not even look whether it was told to stop."""
    begun, log = tmp_path / "begun.csv", tmp_path / "log"
    query = f"COPY (SELECT 1) TO '{begun}'; SELECT {rows} FROM range(1_000_000_000_000) WHERE hash(range) = 5"
    command = start("sql", store.root, query, *(["--out", tmp_path / out] if out else []), log=log)
    try:
        deadline = time.monotonic() + 100
        while not (begun.exists() and begun.stat().st_size):  # it is there, empty, from the beginning of the COPY
            assert command.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the query did not begin"
            time.sleep(0.02)
        command.send_signal(signal.SIGINT)
        assert command.wait(timeout=60) == 130, log.read_text()
    finally:
        end(command.pid)
    assert log.read_text() == "interrupted\n"
    # DuckDB deletes the first file where it had yet to close it.
    assert {path.name for path in tmp_path.iterdir()} - {"begun.csv"} == {"log"}
