"""A result appears whole or not at all, and doing it again under its name replaces it."""

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.runs import RunContent, clustered, write_run
from support.s3 import S3Server

from jobs.retrieve_screen import write_page
from pipeline.report.groups import load_clusterings
from pipeline.report.run import open_run
from pipeline.report.scan import scan_images
from pipeline.retrieval import index as indexes
from pipeline.retrieval import sql
from pipeline.retrieval.arrays import no_progress
from pipeline.retrieval.clusters import write_clusters
from pipeline.retrieval.duplicates import find_duplicates, write_duplicates
from pipeline.retrieval.kmeans import fit
from pipeline.retrieval.labels import Labelled
from pipeline.retrieval.lloyd import ArraySource
from pipeline.retrieval.output import replacing, write_json, write_table
from pipeline.retrieval.probe import run_probe, save_probe
from pipeline.retrieval.store import FeatureStore
from pipeline.storage import put_bytes, read_json
from schemas.errors import OutputError, SpecError

VECTORS = clustered(1500, 16, 4, spread=0.3)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore.open(str(write_run(tmp_path / "run", RunContent({"cls": VECTORS}))))


def cluster(store: FeatureStore, k: int) -> None:
    found = fit(ArraySource(VECTORS), k, spherical=True, restarts=1)
    write_clusters(store, store.load("cls"), store.preparation("cls"), found, "n", {"name": "n"})


def index(store: FeatureStore, k: int) -> None:
    indexes.save(store, indexes.build(store, feature="cls", kind="flat", centre=k > 4), "n")


def deduplicate(store: FeatureStore, k: int) -> None:
    write_duplicates(store, find_duplicates(store, 0.8 + k / 100), "n", {"k": k})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def full_disk() -> Iterator[None]:
    """No file grows beyond 8 KiB, as if the disk were full then."""
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_the_earlier_page(tmp_path: Path) -> None:
    page = tmp_path / "hits.html"
    write_page(str(page), "small")
    with full_disk(), pytest.raises(OutputError, match=f"cannot write {page}") as told:
        write_page(str(page), "large" * 10_000)
    assert "committed" not in str(told.value)
    assert files(tmp_path) == {"hits.html": b"small"}


@pytest.mark.parametrize("command", [["search", "--row", 3], ["duplicates", "--around", 0.9]])
def test_a_page_that_cannot_be_written_takes_no_answer_with_it(
    run: Callable[..., str], store: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    answer = run(command[0], store.root, *command[1:], "--json")
    with pytest.raises(OutputError, match=f"cannot write {tmp_path}/file/page.html"):
        run(command[0], store.root, *command[1:], "--json", "--html", tmp_path / "file" / "page.html")
    assert capsys.readouterr().out == answer


@pytest.mark.parametrize("command", [["search", "--row", 3], ["duplicates", "--around", 0.9]])
def test_a_page_goes_to_a_store_by_the_options_given(
    run: Callable[..., str], store: FeatureStore, s3_server: S3Server, command: list[str]
) -> None:
    page = f"s3://{s3_server.make_bucket()}/page.html"
    options = s3_server.storage_options
    run(command[0], store.root, *command[1:], "--html", page, "--storage-options", json.dumps(options))
    assert fsspec.filesystem("s3", **options).cat(page).startswith(b"<!doctype html>")


@pytest.mark.parametrize(
    ("command", "kind"), [(cluster, "clusters"), (index, "index/n"), (deduplicate, "duplicates")]
)  # fmt: skip
def test_a_full_disk_leaves_the_earlier_result(
    store: FeatureStore, command: Callable[[FeatureStore, int], None], kind: str
) -> None:
    folder = Path(store.root, kind)
    command(store, 4)
    before = files(folder)
    with full_disk(), pytest.raises(OutputError, match=r"cannot write .* larger than the limit"):
        command(store, 5)
    assert files(folder) == before
    command(store, 5)
    assert set(files(folder)) == set(before)
    assert files(folder) != before


def test_a_probe_that_fails_halfway_leaves_the_earlier_one(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = Labelled(np.arange(len(VECTORS)), np.arange(len(VECTORS)) % 2, ["a", "b"])
    found = run_probe(store.load("cls"), labelled, few=(), seed=0, progress=no_progress)
    folder = Path(store.root, "probes")

    def save(seed: int) -> None:
        save_probe(store, found, labelled, {"name": "n", "feature": "cls", "labels_from": "column c", "seed": seed})

    save(1)
    (folder / "n" / "of-before.txt").write_text("x")
    before = files(folder)
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.retrieval.probe.write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(2)
    assert files(folder) == before
    save(2)
    assert set(files(folder)) == {f"n/{name}" for name in ("head.safetensors", "probe.json", "confusion.svg")}
    assert all(files(folder)[name] != before[name] for name in ("n/head.safetensors", "n/probe.json"))


def test_no_room_for_temporary_files_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("pipeline.retrieval.store.MEMORY", "12MiB")
    digests = [f"{row // 2:064x}" for row in range(60_000)]
    content = RunContent({"cls": np.ones((60_000, 1), np.float32)}, sha256=digests, failed={60_000: "NotFound"})
    store = FeatureStore.open(str(write_run(tmp_path / "run", content)))
    sorted_rows = "SELECT * FROM images ORDER BY sha256"
    for ask in (
        lambda: find_duplicates(store, exact_only=True),
        lambda: sql.ask(store, sorted_rows, 60_000),
        lambda: sql.write(store, sorted_rows, str(tmp_path / "rows.csv")),
    ):
        with full_disk(), pytest.raises(OutputError, match=rf"goes to {tmp_path}: make room there"):
            ask()


def test_a_damaged_result_is_told_with_what_to_do(store: FeatureStore) -> None:
    cluster(store, 2)
    Path(store.root, "clusters/n/clusters.parquet").write_bytes(b"half")
    with pytest.raises(OutputError, match=r"cannot read the tables of [\s\S]*made anew by the command that made it"):
        store.sql("SELECT 1")


def test_two_commands_of_one_name_leave_one_result_of_the_last(store: FeatureStore) -> None:
    started = []

    def start_another(what: str, *_: int) -> None:
        if what == "writing clusters" and not started:
            started.append(what)
            cluster(store, 3)

    store.progress = start_another
    cluster(store, 5)
    assert started
    folder = Path(store.root, "clusters")
    assert len(set(pq.read_table(folder / "n").column("cluster").to_pylist())) == 5
    assert read_json(store.fs, f"{folder}/n.json")["k"] == len(np.load(folder / "n.centres.npy")) == 5
    assert sorted(path.name for path in folder.iterdir()) == ["n", "n.centres.npy", "n.json"]


@pytest.mark.parametrize("url", ["memory://home-{pid}", "{tmp}/home"])
def test_nothing_of_the_earlier_result_is_left(tmp_path: Path, url: str) -> None:
    fs, home = fsspec.core.url_to_fs(url.format(pid=os.getpid(), tmp=tmp_path))

    def write(name: str, *names: str) -> None:
        with replacing(fs, home, name) as staging:
            for path in names:
                put_bytes(fs, f"{staging}/{path}", path.encode())

    def interrupted(name: str, path: str) -> None:
        with replacing(fs, home, name) as staging:
            put_bytes(fs, f"{staging}/{path}", b"")
            raise KeyboardInterrupt

    def there() -> list[str]:
        return sorted(str(path).removeprefix(home).strip("/") for path in fs.find(home) if "/." not in str(path))

    other = ["n.x.json", "n.x/a.parquet"]
    write("n.x", *other)
    put_bytes(fs, f"{home}/.n-{int(time.time()) - 90_000}-0123abcd/n/a.parquet", b"of a command that was killed")
    put_bytes(fs, f"{home}/.n-{int(time.time())}-0123abcd/n/a.parquet", b"of one at work")
    write("m", "m/a.parquet", "m/b.parquet", "m.json", "m.svg")
    write("m", "m/b.parquet", "m/c.parquet", "m.json", "m.delete.txt")
    assert there() == ["m.delete.txt", "m.json", "m/b.parquet", "m/c.parquet", *other]
    with pytest.raises(KeyboardInterrupt):
        interrupted("m", "m/z.parquet")
    assert there() == ["m.delete.txt", "m.json", "m/b.parquet", "m/c.parquet", *other]
    hidden = [path for path in fs.find(home) if "/." in str(path)]
    assert len(hidden) == 1, "what was left long ago is gone, what is being written is not"
    fs.rm(home, recursive=True)


def in_parts(store: FeatureStore, cluster: int) -> None:
    """A clustering of one file a part, as tasks write it."""
    with replacing(store.fs, f"{store.root}/clusters", "n") as home:
        for number in range(4):
            columns = {"row": [number], "cluster": [cluster], "distance": [0.5]}
            write_table(store.fs, f"{home}/n/{number}.parquet", pa.table(columns))
        write_json(store.fs, f"{home}/n.json", {})


@pytest.mark.parametrize("copied", [0, 2, 4])
def test_two_halves_of_a_swap_are_not_taken_for_a_result(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, copied: int
) -> None:
    memory, base = fsspec.filesystem("memory"), f"/halves-{os.getpid()}"
    memory.put(store.root, base, recursive=True)
    store = FeatureStore.open(f"memory:/{base}")
    in_parts(store, 1)
    real, done = memory.cp_file, []

    def killed(*paths: str) -> None:
        if len(done) == copied:
            raise KeyboardInterrupt
        done.append(paths)
        real(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(memory, "cp_file", killed)
        with pytest.raises(KeyboardInterrupt):
            in_parts(store, 2)
    assert len(memory.find(f"{base}/clusters")) == copied, "nothing of the earlier result"
    with pytest.raises(SpecError, match="clusters_n does not exist"):
        store.sql("SELECT * FROM clusters_n")
    opened = open_run(f"memory:/{base}", {})
    assert not list(load_clusterings(opened, scan_images(opened)))
    in_parts(store, 3)
    assert store.sql("SELECT DISTINCT cluster FROM clusters_n").to_pylist() == [{"cluster": 3}]
    assert [grouping.name for grouping in load_clusterings(opened, scan_images(opened))] == ["n"]
    memory.rm(base, recursive=True)
