"""`explore` finds pictures by words where the model of the run has a text tower."""

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report.album import Album
from report.explore_client import Client, serving
from report.html_page import Page
from support import lit
from support.runs import RunContent, clustered, write_run

from jobs.explore import _open
from pipeline.models import inspect_model
from pipeline.retrieval.matrix import Matrix
from pipeline.retrieval.store import FeatureStore
from pipeline.sinks import compaction
from schemas.run import ModelRecord

COUNT = 80
IDS = [2, 4, 13, 12] + [0] * (lit.LENGTH - 4)  # [CLS] a red house


@pytest.fixture(scope="module")
def arrays() -> lit.Arrays:
    return lit.random_pair("bert")


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, arrays: lit.Arrays) -> RunContent:
    """Features of random pixels, by a random LiT pair; `cls` is another space, of which texts know nothing."""
    folder = tmp_path_factory.mktemp("lit")
    np.savez(folder / "LiT-X.npz", **arrays)
    lit.write_words(folder / "LiT-X.txt")
    model = record_of(folder / "LiT-X.npz")
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, lit.SIZE, lit.SIZE, 3), np.uint8)
    pooled = lit.images(arrays, pixels).astype(np.float32)
    return RunContent({"cls": clustered(COUNT, lit.WIDTH, 3), "pooled": pooled}, model=model)


def record_of(checkpoint: Path) -> ModelRecord:
    info = inspect_model(str(checkpoint))
    return ModelRecord(
        name=info.name, family=info.family, architecture=info.architecture, digest=info.digest, dtype="float32",
        hidden_size=info.hidden_size, num_labels=0, pooled=info.pooled, preprocessing=info.preprocessing,
    )  # fmt: skip


def copies(run: Path) -> set[str]:
    """Features of which there is a matrix on the disk."""
    return {folder.name.partition("-")[0] for folder in (run / "index" / "_matrix").iterdir()}


def rows_in(page: Page) -> list[int]:
    return [int(str(source).partition("row=")[2]) for source in page.attributes("img", "src")]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, content: RunContent) -> Iterator[Client]:
    with serving(_open(str(write_run(tmp_path_factory.mktemp("run"), content)), None, {})) as server:
        yield Client(server)


def test_report_explore_search_by_text(client: Client, content: RunContent, arrays: lit.Arrays) -> None:
    cosines = content.features["pooled"] @ lit.texts(arrays, [IDS])[0]
    best = np.argsort(-cosines)
    assert "words" in client.page("/").attributes("input", "name")
    pages = [client.page("/words", words=" a red house ", page=page) for page in (1, 2)]
    assert [*rows_in(pages[0]), *rows_in(pages[1])] == best.tolist()
    assert "Like “a red house”" in pages[0].text
    assert "Cosine of pooled, exact search" in pages[0].text
    assert f" {cosines[best[0]]:.3f} " in pages[0].text
    assert client.request("/words?words=++")[0] == 400
    hostile = client.page("/words", words="<script>a</script>")
    assert not [tag for tag, _ in hostile.tags if tag == "script"]


def refusal(client: Client) -> str:
    """The page of a search by text that cannot be."""
    status, _, body = client.request("/words?words=a+house")
    assert status == 500
    assert "No search by text" in body.decode()
    return body.decode()


def test_report_explore_says_why_no_text_can_be_searched(tmp_path: Path, content: RunContent) -> None:
    assert content.model is not None
    gone = replace(content, model=content.model.model_copy(update={"name": str(tmp_path / "gone.npz")}))
    with serving(_open(str(write_run(tmp_path / "run", gone)), None, {})) as server:
        client = Client(server)
        assert "words" in client.page("/").attributes("input", "name")
        assert "gone.npz" in refusal(client)


@pytest.mark.timeout(120)
def test_report_explore_reads_no_vectors_for_texts_before_it_is_asked(
    tmp_path: Path, content: RunContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = write_run(tmp_path, content)
    with serving(_open(str(run), None, {})) as server:
        client = Client(server)
        assert copies(run) == {"cls"}
        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_fallocate", full)
            said = refusal(client)
        assert "cannot keep the vectors in" in said
        assert "No space left on device" in said
        assert client.page("/picture", row=3).attributes("img", "src")
        assert len(rows_in(client.page("/words", words="a house"))) == 60
    assert copies(run) == {"cls", "pooled"}


@pytest.mark.timeout(120)
def test_report_explore_of_a_model_that_turns_out_to_have_no_text_tower(
    tmp_path: Path, content: RunContent, arrays: lit.Arrays
) -> None:
    image = {name.removeprefix("params/img/"): array for name, array in arrays.items() if "/img/" in name}
    np.savez(tmp_path / "ViT-X.npz", **{name: array for name, array in image.items() if not name.startswith("head/")})
    model = record_of(tmp_path / "ViT-X.npz").model_copy(update={"pooled": "cls"})
    run = write_run(tmp_path / "run", replace(content, model=model))
    with serving(_open(str(run), None, {})) as server:
        client = Client(server)
        assert "words" in client.page("/").attributes("input", "name")
        assert "ViT-X.npz (vit) has no text tower" in refusal(client)
    assert copies(run) == {"cls"}


@pytest.mark.timeout(120)
def test_report_explore_search_by_text_outlives_a_compaction(tmp_path: Path, content: RunContent) -> None:
    run = write_run(tmp_path / "run", content)
    with serving(_open(str(run), "pooled", {})) as server:
        before = Client(server).page("/words", words="a house").text
    with serving(_open(str(run), "cls", {})) as server:
        assert compaction.compact(str(run), 1 << 30, {}) == 2
        assert Client(server).page("/words", words="a house").text == before


@pytest.mark.timeout(120)
def test_report_explore_search_by_text_shows_no_rows_that_came_later(tmp_path: Path, content: RunContent) -> None:
    fewer = {name: vectors[: COUNT // 2] for name, vectors in content.features.items()}
    run = write_run(tmp_path / "run", replace(content, features=fewer))
    with serving(_open(str(run), None, {})) as server:
        for part in (run / "images").iterdir():
            part.unlink()
        write_run(run, content)
        assert sorted(rows_in(Client(server).page("/words", words="a house"))) == list(range(COUNT // 2))


@pytest.mark.parametrize("kind", ["no text tower", "no pooled", "BEiT"])
def test_report_explore_without_texts_has_no_such_box(tmp_path: Path, content: RunContent, kind: str) -> None:
    assert content.model is not None
    if kind == "no text tower":
        run = Album(tmp_path, count=4, failed={}).write()
    elif kind == "no pooled":
        run = write_run(tmp_path, replace(content, features={"cls": content.features["cls"]}))
    else:
        run = write_run(
            tmp_path, replace(content, model=content.model.model_copy(update={"pooled": "cls", "family": "beit"}))
        )
    with serving(_open(str(run), None, {})) as server:
        client = Client(server)
        assert "words" not in client.page("/").attributes("input", "name")
        assert client.request("/words?words=dog")[0] == 404


def test_report_explore_searches_by_picture_while_the_vectors_for_texts_are_read(
    tmp_path: Path, content: RunContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    exploration = _open(str(write_run(tmp_path / "run", content)), None, {})
    begun, go_on = threading.Event(), threading.Event()
    load = FeatureStore.load

    def held_up(store: FeatureStore, feature: str) -> Matrix:
        begun.set()
        assert go_on.wait(60)
        return load(store, feature)

    monkeypatch.setattr(FeatureStore, "load", held_up)
    with serving(exploration) as server, ThreadPoolExecutor(1) as threads:
        client = Client(server)
        words = threads.submit(client.request, "/words?words=a+house")
        assert begun.wait(60)
        try:
            assert "Cosine of cls" in client.page("/picture", row=3).text
        finally:
            go_on.set()
        assert words.result()[0] == 200
