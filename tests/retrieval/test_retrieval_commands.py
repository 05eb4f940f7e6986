"""The commands as a person or a script runs them: output, files, errors, and what they import."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image
from support.runs import RunContent, clustered, run_record, write_run

from jobs import retrieve, retrieve_labels
from pipeline.retrieval.store import FeatureStore
from schemas.errors import OutputError, PatchstreamError, SpecError

Run = Callable[..., str]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four groups of vectors; real files on disk, of which the first has a hostile name."""
    folder = tmp_path_factory.mktemp("pictures")
    names = ["<b onclick='x()'>.png", *(f"{row:03d}.png" for row in range(1, 400))]
    for row, name in enumerate(names[:20]):
        Image.new("RGB", (40, 30), (row * 12, 80, 120)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    vectors = np.repeat(np.eye(4, 16, dtype=np.float32), 100, axis=0)
    vectors += 0.1 * np.random.default_rng(0).standard_normal(vectors.shape).astype(np.float32)
    vectors[399] = vectors[0] * 1.5
    names = ["<b onclick='x()'>.png", *(f"{row:03d}.png" for row in range(1, 400))]
    kinds = [f"kind {row // 100}" for row in range(400)]
    content = RunContent(
        {"cls": vectors},
        uris=[str(pictures / name) for name in names],
        labels=[[(row // 100, kinds[row], 0.9)] for row in range(400)],
        user={"kind": kinds},
    )
    return write_run(tmp_path_factory.mktemp("run"), content)


def test_search_prints_json_and_writes_a_page(run: Run, directory: Path, tmp_path: Path) -> None:
    page = tmp_path / "hits.html"
    found = json.loads(run("search", directory, "--row", 399, "-k", 3, "--json", "--html", page))
    assert [sorted(hit) for hit in found] == [["row", "score", "uri"]] * 3
    assert found[0]["row"] == 0
    assert found[0]["score"] == pytest.approx(1)
    html = page.read_text()
    assert html.count("data:image/") >= 1
    assert "<b onclick" not in html
    assert "&lt;b onclick" in html


def test_search_table_filter_minus_and_vector(run: Run, directory: Path, tmp_path: Path) -> None:
    vector = tmp_path / "q.npy"
    np.save(vector, FeatureStore.open(str(directory)).matrix("cls")[250])
    table = run("search", directory, "--vector", vector, "--filter", "labels[1].label = 'kind 1'", "-k", 4)
    assert table.splitlines()[0].split() == ["row", "score", "uri"]
    assert all(100 <= int(line.split()[0]) < 200 for line in table.splitlines()[1:])
    hits = json.loads(run("search", directory, "--row", 5, "--row", 105, "--minus", "row=106", "--json"))
    assert all(hit["row"] not in (5, 105, 106) for hit in hits)
    assert json.loads(run("search", directory, "--row", 5, "--row", 105, "--minus", 106, "--json")) == hits


def test_index_then_search_by_it(run: Run, directory: Path) -> None:
    summary = json.loads(run("index", directory, "--kind", "ivf-flat", "--name", "lists", "--evaluate", "--json"))
    assert summary["recall_at_10"] >= 0.95
    assert summary["ms_a_query"] > 0
    exact = json.loads(run("search", directory, "--row", 42, "--json"))
    by_index = json.loads(run("search", directory, "--row", 42, "--json", "--index", "lists"))
    assert len({hit["row"] for hit in exact} & {hit["row"] for hit in by_index}) >= 9
    again = json.loads(run("index", directory, "--name", "lists", "--evaluate", "--json"))
    assert again["kind"] == "ivf-flat"
    for option in ("--features=cls", "--centre", "--no-normalise", "--ray=local"):
        with pytest.raises(SpecError, match=f"as it was built; leave out {option.partition('=')[0]}, or add --kind"):
            run("index", directory, "--name", "lists", "--evaluate", option)
    with pytest.raises(OutputError, match="no index `absent`"):
        run("search", directory, "--row", 42, "--index", "absent")
    with pytest.raises(SpecError, match="leave out --centre"):
        run("search", directory, "--row", 42, "--index", "lists", "--centre")


def test_a_run_without_cls_is_asked_by_the_feature_that_it_has(run: Run, tmp_path: Path) -> None:
    """SigLIP and MLP-Mixer have no CLS token; where there is one, it is the first."""
    vectors = clustered(60, 8, 3, seed=1)
    kinds = [f"kind {row % 2}" for row in range(60)]
    directory = write_run(tmp_path / "run", RunContent({"pooled": vectors}, user={"kind": kinds}))
    hits = json.loads(run("search", directory, "--row", 3, "--json"))
    assert hits == json.loads(run("search", directory, "--row", 3, "--json", "--features", "pooled"))
    assert json.loads(run("index", directory, "--json"))["feature"] == "pooled"
    assert json.loads(run("search", directory, "--row", 3, "--json", "--index", "main"))[0]["row"] == hits[0]["row"]
    assert json.loads(run("kmeans", directory, "-k", 3, "--json"))["feature"] == "pooled"
    assert json.loads(run("duplicates", directory, "--json"))["feature"] == "pooled"
    assert json.loads(run("probe", directory, "--label-column", "kind", "--json"))["feature"] == "pooled"
    with pytest.raises(OutputError, match=r"no feature `cls`; it has: pooled \(8\)"):
        run("search", directory, "--row", 3, "--features", "cls")
    both = write_run(tmp_path / "both", RunContent({"pooled": vectors[::-1], "cls": vectors}))
    assert json.loads(run("search", both, "--row", 3, "--json")) == hits
    bare = write_run(tmp_path / "bare", RunContent({"pooled": vectors}))
    for part in (bare / "images").iterdir():
        pq.write_table(pq.read_table(part).drop_columns(["pooled"]), part)
    with pytest.raises(OutputError, match="it has: none"):
        run("kmeans", bare, "-k", 3)
    assert json.loads(run("duplicates", bare, "--exact-only", "--json"))["groups"] == 0


def test_texts_are_compared_with_pooled_alone(run: Run, tmp_path: Path) -> None:
    content = RunContent({"cls": clustered(9, 8, 3, seed=1), "pooled": clustered(9, 8, 3, seed=1)})
    content.model = run_record(content).model.model_copy(update={"pooled": "projected_cls"})
    directory = write_run(tmp_path, content)
    with pytest.raises(SpecError, match="not with `cls`; leave out --features"):
        run("search", directory, "--features", "cls", "--text", "a red house")
    with pytest.raises(SpecError, match="--text is empty"):
        run("search", directory, "--text", "a red house", "--text", " ")
    content.features = {"cls": content.features["cls"]}
    without = write_run(tmp_path / "without", content)
    with pytest.raises(OutputError, match=r"no feature `pooled`; it has: cls \(8\)"):
        run("search", without, "--text", "a red house")


def test_an_index_that_no_search_can_use_says_so(run: Run, directory: Path) -> None:
    built = run("index", directory, "--kind", "flat", "--name", "raw", "--no-normalise")
    assert "patchstream search" not in built
    with pytest.raises(SpecError, match="--index raw was built with --no-normalise"):
        run("search", directory, "--row", 42, "--index", "raw")


def test_an_index_is_stale_once_rows_in_it_were_replaced(run: Run, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((40, 8), np.float32)
    directory = write_run(tmp_path / "run", RunContent({"cls": vectors}))
    run("index", directory, "--kind", "flat")
    assert run("search", directory, "--row", 5, "--index", "main")
    (part,) = (directory / "manifest").glob("*.parquet")
    manifest = pq.read_table(part)
    place = manifest.column_names.index("replaces")
    replaces = pa.array([None] * 39 + [7], pa.int64())
    pq.write_table(manifest.set_column(place, "replaces", replaces), part)
    with pytest.raises(OutputError, match=r"index `main` is stale: rows that it holds were replaced since"):
        run("search", directory, "--row", 5, "--index", "main")
    run("index", directory, "--update")
    assert '"row": 7' not in run("search", directory, "--row", 5, "--index", "main", "--json", "-k", 39)


def test_kmeans_and_sweep(run: Run, directory: Path) -> None:
    text = run("kmeans", directory, "-k", 4, "--name", "four")
    assert "kind 2 (100%, 25.0%)" in text
    assert pq.read_table(directory / "clusters" / "four").num_rows == 400
    summary = json.loads(run("kmeans", directory, "--sweep", "2:8", "--json"))
    assert summary["k"] == 4
    assert (directory / "clusters" / "k4.svg").exists()
    rows = json.loads(run("sql", directory, "SELECT count(DISTINCT cluster) AS n FROM clusters_k4", "--json"))
    assert rows == [{"n": 4}]


def test_kmeans_checks_before_it_computes(run: Run, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("computed before the options were checked")

    run("kmeans", directory, "-k", 4, "--name", "kept")
    monkeypatch.setattr("pipeline.retrieval.clustering.fit", too_late)
    monkeypatch.setattr("cluster.session.ray_session", too_late)
    monkeypatch.setattr(FeatureStore, "load", too_late)
    for place in ([], ["--ray", "local"]):
        with pytest.raises(SpecError, match="--label-column typo: images/ has the columns row, "):
            run("kmeans", directory, "-k", 3, "--name", "kept", "--label-column", "typo", *place)
        with pytest.raises(SpecError, match="--name 'a/b'"):
            run("kmeans", directory, "-k", 3, "--name", "a/b", *place)
        with pytest.raises(SpecError, match="--name 'a/b'"):
            run("index", directory, "--name", "a/b", *place)
    assert set(pq.read_table(directory / "clusters" / "kept").column("cluster").to_pylist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kmeans", "--sweep", "abc"], "--sweep abc: expected LOW:HIGH"),
        (["duplicates", "--threshold", "2"], "--threshold 2"),
        (["duplicates", "--around", "7"], "--around 7"),
        (["index", "--kind", "lsh"], "--kind lsh: choose one of"),
        (["index", "--kind", "hnsw", "--ray", "local"], "--kind hnsw cannot be built over parts"),
        (["kmeans", "-k", "401", "--ray", "local"], "-k 401: there are 400 rows"),
        (["kmeans", "--sweep", "2:400"], "--sweep up to 400: there are 400 rows"),
        (["search", "--vector", "/nope.npy"], "--vector /nope.npy: no such file"),
        (["search", "--row", "3", "--filter", "typo = 1"], "typo[^|]*in: SELECT"),
        (["search", "--row", "3", "--filter", "true", "--index", "main"], "do not go together"),
        (["probe", "--labels", "/nope.csv"], "--labels /nope.csv: no such file"),
        (["probe", "--label-column", "typo"], "--label-column typo: images/ has the columns"),
    ],
)
def test_mistakes_are_told_before_any_vector_is_read(
    run: Run, directory: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(FeatureStore, "load", lambda *_: pytest.fail("read"))
    monkeypatch.setattr("cluster.session.ray_session", lambda *_: pytest.fail("started Ray"))
    with pytest.raises(SpecError, match=message):
        run(arguments[0], directory, *arguments[1:])


def test_duplicates_and_around(run: Run, directory: Path, tmp_path: Path) -> None:
    summary = json.loads(run("duplicates", directory, "--threshold", 0.999, "--json"))
    assert summary["groups"] == 1
    table = pq.read_table(directory / "duplicates" / "main")
    assert table.column("row").to_pylist() == [0, 399]
    listed = (directory / "duplicates" / "main.delete.txt").read_text()
    assert listed.splitlines() == [FeatureStore.open(str(directory)).uris(np.array([399]))[0]]
    bands = run("duplicates", directory, "--around", 0.9, "--html", tmp_path / "pairs.html")
    assert len(bands.splitlines()) == 11
    assert (tmp_path / "pairs.html").exists()


def test_probe_then_apply_then_ask(run: Run, directory: Path, tmp_path: Path) -> None:
    summary = json.loads(run("probe", directory, "--label-column", "kind", "--shots", "1,5", "--seeds", 2, "--json"))
    assert summary["linear"]["accuracy"] > 0.97
    assert set(summary["few_shot"]) == {"1", "5"}
    assert (directory / "probes" / "main" / "confusion.svg").exists()
    assert "k-NN" in run("probe", directory, "--label-column", "kind", "--name", "other")
    out = tmp_path / "labelled"
    run("apply", directory, "--probe", "main", "--out", out)
    rows = json.loads(
        run("sql", out, "SELECT labels[1].label AS l, count(*) AS n FROM images GROUP BY l ORDER BY l", "--json")
    )
    assert [item["l"] for item in rows] == [f"kind {kind}" for kind in range(4)]


def test_labels_that_name_no_row_are_told(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{row},{row // 100}" for row in range(0, 400, 5)] + [f"{row},x" for row in range(1000, 1012)]
    (tmp_path / "l.csv").write_text("\n".join(["row,label", *lines]))
    assert retrieve_labels.probe(str(directory), labels=str(tmp_path / "l.csv"), name="csv") == 0
    warning = capsys.readouterr().err
    assert "12 of the 92 names in" in warning
    assert "left out: 1000, 1001," in warning
    assert "1009, …" in warning


def test_sql_prints_and_writes(run: Run, directory: Path, tmp_path: Path) -> None:
    text = run("sql", directory, "SELECT row, kind, cls FROM images ORDER BY row", "--limit", 2)
    assert len(text.splitlines()) == 3
    assert "… 16]" in text
    assert run("sql", directory, "SELECT row FROM nearest(0, 2)", "--out", tmp_path / "n.csv").startswith("2 rows")
    assert json.loads(run("sql", directory, "SELECT 'nan'::FLOAT AS x, DATE '2026-01-02' AS d", "--json")) == [
        {"x": None, "d": "2026-01-02"}
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "{d}"], "nothing to search for"),
        (["search", "{d}", "--text", "a cat"], "no text tower"),
        (["search", "{d}", "--row", "1", "-k", "401"], "-k 401: 400 rows"),
        (["search", "{d}", "--row", "1", "--device", "gpu"], "--device gpu: choose cpu or cuda"),
        (["search", "{d}", "--row", "1", "--features", "pooled"], "no feature `pooled`; it has: cls"),
        (["kmeans", "{d}"], "either -k N or --sweep"),
        (["kmeans", "{d}", "-k", "2", "--ray", "local", "--mini-batch"], "--ray goes over all rows"),
        (["index", "{d}", "--update", "--kind", "flat"], "--update keeps an index as it was built"),
        (["index", "{d}", "--update", "--features", "cls", "--centre"], "leave out --features, --centre, or build it"),
        (["index", "{d}", "--update", "--no-normalise"], "leave out --no-normalise, or build it anew"),
        (["duplicates", "{d}", "--html", "{t}/p.html"], "--html writes the pairs that --around"),
        (["duplicates", "{d}", "--around", "0.9", "--exact-only"], "writes no table; leave out --exact-only"),
        (["duplicates", "{d}", "--exact-only", "--threshold", "0.9"], "files, not vectors; leave out --threshold"),
        (["kmeans", "{d}", "-k", "500"], "-k 500: there are 400"),
        (["kmeans", "{d}", "-k", "2", "--name", "a/b"], "--name"),
        (["duplicates", "{d}", "--threshold", "2"], "--threshold 2"),
        (["probe", "{d}"], "either --label-column C or --labels"),
        (["probe", "{d}", "--label-column", "kind", "--shots", "0"], "--shots 0"),
        (["probe", "{d}", "--label-column", "kind", "--shots", "99"], "--shots 99: class"),
        (["apply", "{d}", "--probe", "absent", "--out", "{t}"], "no probe `absent`"),
        (["sql", "{d}", "SELECT 1 FROM nowhere"], "nowhere"),
        (["sql", "{t}", "SELECT 1"], "not the directory of a run"),
    ],
)
def test_bad_input_is_explained(run: Run, directory: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    filled = [argument.format(d=directory, t=tmp_path) for argument in arguments]
    with pytest.raises(PatchstreamError, match=message) as caught:
        run(*filled)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("command", [["kmeans", "-k", "2"], ["probe", "--label-column", "kind"]])
def test_negative_seed_is_refused(run: Run, directory: Path, command: list[str]) -> None:
    with pytest.raises(typer.BadParameter, match="0"):
        run(command[0], directory, *command[1:], "--seed", -1)


@pytest.mark.parametrize("command", [["kmeans"], ["kmeans", "--ray", "local"], ["search", "--row", "1"]])
def test_less_than_one_is_refused(run: Run, directory: Path, command: list[str]) -> None:
    with pytest.raises(typer.BadParameter, match="1"):
        run(command[0], directory, *command[1:], "-k", 0)


def test_few_rows_and_the_default_k(run: Run, tmp_path: Path) -> None:
    directory = write_run(tmp_path, RunContent({"cls": clustered(4, 8, 2)}))
    assert len(json.loads(run("search", directory, "--row", 1, "--json"))) == 3


def test_left_out_rows_are_named(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors: Any = clustered(30, 8, 2)
    vectors[[3, 5]] = np.nan
    directory = write_run(tmp_path, RunContent({"cls": vectors}))
    capsys.readouterr()
    app = typer.Typer()
    app.command("search")(retrieve.search)
    app.command("index")(retrieve.index)
    app(["search", str(directory), "--row", "1"], standalone_mode=False)
    assert "2 rows have a zero or non-finite `cls` and are left out: 3, 5" in capsys.readouterr().err


def test_commands_import_nothing_heavy() -> None:
    code = (
        "import sys, jobs.retrieve, jobs.retrieve_groups, jobs.retrieve_labels\n"
        "heavy = {'torch', 'ray', 'pandas', 'numpy', 'pyarrow', 'faiss', 'duckdb', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
