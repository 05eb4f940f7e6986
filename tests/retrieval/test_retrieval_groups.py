"""What `duplicates` and `kmeans` print and leave, beyond which groups they find."""

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.runs import RunContent, clustered, write_run

from pipeline.retrieval.duplicates import find_duplicates
from pipeline.retrieval.pairs import ALL_PAIRS
from pipeline.retrieval.store import FeatureStore

Run = Callable[..., str]


def test_bands_are_shown_where_they_lie(run: Run, tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", RunContent({"cls": np.eye(4, dtype=np.float32)}))
    page = tmp_path / "pairs.html"
    shown = run("duplicates", directory, "--around", 0.9055, "--html", page)
    wanted = [f"{0.9455 - step / 100:g} to {0.9555 - step / 100:g}" for step in range(10)]
    assert re.findall(r"^\S+ to \S+", shown, re.MULTILINE) == wanted
    assert re.findall(r"(0\.\d+ to 0\.\d+): 0 pairs", page.read_text()) == wanted
    assert "0.99 to 1 " in run("duplicates", directory, "--around", 0.97)


def test_lists_of_many_vectors_take_what_the_docs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = ALL_PAIRS + 20_000
    vectors = clustered(count, 32, 50, spread=3.0)
    store = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": vectors}))))
    store.load("cls")
    monkeypatch.setattr("pipeline.retrieval.matrix.CHUNK_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        assert find_duplicates(store, 0.999).groups == 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Ids and lengths, 12 bytes, were there before; a chunk and the sample that finds the lists take 50 at this size.
    assert peak < (90 - 12 + 50) * count


def test_places_are_printed_as_a_store_has_them(run: Run, tmp_path: Path) -> None:
    """A directory is often named with a slash, and in a bucket `run//clusters` is another place than `run/clusters`."""
    content = RunContent({"cls": clustered(60, 8, 4)}, user={"kind": [f"k{row % 2}" for row in range(60)]})
    directory = write_run(tmp_path / "run", content)
    commands = {
        ("kmeans", f"{directory}/", "-k", 4): [f"rows in {directory}/clusters/k4/"],
        ("duplicates", f"{directory}/"): [f"{directory}/duplicates/main/ ", f"{directory}/duplicates/main.delete.txt "],
        ("probe", f"{directory}/", "--label-column", "kind"): [f"saved in {directory}/probes/main/;"],
        ("apply", directory, "--probe", "main", "--out", f"{tmp_path}/labelled/"): [f"in {tmp_path}/labelled/"],
    }
    for command, expected in commands.items():
        told = run(*command)
        assert [place for place in expected if place not in told] == []
        assert f"{tmp_path}/labelled//" not in told
