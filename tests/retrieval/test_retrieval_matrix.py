"""Where the matrix of a run is kept: whose vectors it holds, how many copies there are, and disks without room."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import RunContent, write_run

from pipeline.retrieval import matrix_files as module
from pipeline.retrieval.arrays import unit
from pipeline.retrieval.matrix import map_matrix
from pipeline.retrieval.nearest import top_k
from pipeline.retrieval.parts import fingerprint, stream_part
from pipeline.retrieval.store import FeatureStore
from schemas.errors import OutputError


@pytest.fixture
def content() -> RunContent:
    vectors = np.random.default_rng(1).standard_normal((90, 8), dtype=np.float32)
    return RunContent(features={"cls": vectors}, parts=3)


@pytest.fixture
def run(tmp_path: Path, content: RunContent) -> Path:
    return write_run(tmp_path / "run", content)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refuse_index_folder(run: Path) -> None:
    (run / "index").write_text("a file where the folder should be")


@pytest.mark.parametrize("other", ["run", "model"])
def test_same_rows_and_bytes_by_another_run_or_model(run: Path, content: RunContent, other: str) -> None:
    before = FeatureStore.open(str(run))
    before.matrix("cls")
    negative = {"cls": -content.features["cls"]}
    write_run(run, replace(content, features=negative, digest="f" * 64 if other == "model" else content.digest))
    if other == "run":
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | {"run_id": "another"}))
    store = FeatureStore.open(str(run))
    # As a run leaves them, which does not compress vectors: of the same size.
    store.parts = before.parts
    assert fingerprint(store.parts, store.record) != fingerprint(before.parts, before.record)
    np.testing.assert_array_equal(store.matrix("cls"), negative["cls"])


def test_the_cache_keeps_the_newest_matrix_of_each_run(
    run: Path, cache: Path, tmp_path: Path, content: RunContent
) -> None:
    other = write_run(tmp_path / "other", content)
    for directory in (run, other):
        refuse_index_folder(directory)
        FeatureStore.open(str(directory)).matrix("cls")
    sorted((run / "images").glob("*.parquet"))[-1].unlink()
    assert FeatureStore.open(str(run)).matrix("cls").shape == (60, 8)
    assert sorted(np.load(path).size for path in cache.rglob("rows.npy")) == [60, 90]


@pytest.mark.parametrize("system", ["Linux", "macOS"])
def test_space_is_reserved_before_the_parts_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """A write through the map to a full disk would end the process by a bus error."""
    run = write_run(tmp_path, RunContent({"cls": np.ones((4000, 64), np.float32)}))
    if system == "macOS":
        monkeypatch.delattr(os, "posix_fallocate")
        monkeypatch.setattr(module, "CHUNK_BYTES", 300_000)
    reserved: list[int] = []

    def look(*arguments: Any) -> Any:
        (file,) = (run / "index" / "_matrix").glob(".*/vectors.npy")
        reserved.append(file.stat().st_blocks * 512)
        return stream_part(*arguments)

    monkeypatch.setattr(module, "stream_part", look)
    vectors = FeatureStore.open(str(run)).matrix("cls")
    assert min(reserved) >= 4000 * 64 * 4
    np.testing.assert_array_equal(vectors, 1)


def test_full_disk_is_explained(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"index/_matrix/cls-\w+, 3,960 bytes: No space left on device\. Make room"):
        FeatureStore.open(str(run)).matrix("cls")
    assert not list((run / "index" / "_matrix").iterdir())


def test_no_folder_that_can_be_written_is_explained(run: Path, cache: Path) -> None:
    refuse_index_folder(run)
    cache.write_text("a file where the folder should be")
    with pytest.raises(OutputError, match=r"cannot keep the vectors in .*/cache/.*PATCHSTREAM_CACHE"):
        FeatureStore.open(str(run)).matrix("cls")


def test_an_interrupt_waits_for_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path, RunContent({"cls": np.ones((40, 4), np.float32)}, parts=40))
    asked: list[str] = []
    over = threading.Event()

    def slow(fs: Any, part: Any, *rest: Any) -> Any:
        asked.append(part.name)
        if len(asked) > 1:
            over.wait(3)
        return stream_part(fs, part, *rest)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "stream_part", slow)
    store = FeatureStore.open(str(run))
    store.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        store.matrix("cls")
    over.set()
    assert len(asked) < 40
    assert not list((run / "index" / "_matrix").iterdir())


def test_what_a_killed_command_left_is_removed_after_a_day(run: Path) -> None:
    base = run / "index" / "_matrix"
    for name, age_s in ((".cls-0123-left", 25 * 3600), (".cls-0123-busy", 3600)):
        (base / name).mkdir(parents=True)
        for path in (base / name / "vectors.npy", base / name):
            path.touch()
            os.utime(path, (0, time.time() - age_s))
    FeatureStore.open(str(run)).matrix("cls")
    assert [path.name for path in base.glob(".cls-*")] == [".cls-0123-busy"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the size of memory and swap")
def test_a_matrix_larger_than_memory_and_swap_is_mapped(tmp_path: Path) -> None:
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    room = sum(int(known[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    dim = 1 << 20
    count = 2 * room // (4 * dim)
    path = tmp_path / "vectors.npy"
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, dim)}
        np.lib.format.write_array_header_1_0(file, header)
        try:
            file.truncate(file.tell() + 4 * count * dim)
        except OSError as error:
            pytest.skip(f"the file system cannot hold a file of that size: {error}")
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("the file system has no sparse files")
    np.save(tmp_path / "rows.npy", np.arange(count))
    np.save(tmp_path / "norms.npy", np.ones(count, np.float32))
    matrix = map_matrix(tmp_path, "cls", np.empty(0, np.int64))
    assert matrix.vectors.nbytes > room
    assert matrix.take(np.array([count - 1])).sum() == 0


def test_search_in_the_map_warns_of_nothing(run: Path, content: RunContent) -> None:
    matrix = FeatureStore.open(str(run)).load("cls")
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, found = top_k(matrix, unit(content.features["cls"][:4]), 1)
    finally:
        torch.set_warn_always(False)
    assert not matrix.vectors.flags.writeable
    assert found[:, 0].tolist() == [0, 1, 2, 3]


def test_a_process_that_ends_while_a_thread_makes_a_matrix_leaves_none(tmp_path: Path) -> None:
    """As `explore` may: what was registered for the end is run, the thread is not waited for."""
    code = (
        "import atexit, os, sys, threading\n"
        "from pathlib import Path\n"
        "from pipeline.retrieval.matrix_files import _staged_folder\n"
        "begun = threading.Event()\n"
        "def make():\n"
        "    with _staged_folder(Path(sys.argv[1]) / 'pooled-x', 1) as folder:\n"
        "        (folder / 'vectors.npy').write_bytes(b'x')\n"
        "        begun.set()\n"
        "        threading.Event().wait()\n"
        "threading.Thread(target=make, daemon=True).start()\n"
        "assert begun.wait(60)\n"
        "atexit._run_exitfuncs()\n"
        "os._exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=100, check=False)
    assert done.returncode == 3
    assert list(tmp_path.iterdir()) == []
