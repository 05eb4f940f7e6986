"""`explore` finds pictures by words where the model of the run has a text tower."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report.album import Album
from report.explore_client import Client, serving
from support import lit
from support.runs import RunContent, clustered, write_run

from jobs.explore import _open
from pipeline.models import inspect_model
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
    info = inspect_model(str(folder / "LiT-X.npz"))
    model = ModelRecord(
        name=info.name, family=info.family, architecture=info.architecture, digest=info.digest, dtype="float32",
        hidden_size=info.hidden_size, num_labels=0, pooled=info.pooled, preprocessing=info.preprocessing,
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, lit.SIZE, lit.SIZE, 3), np.uint8)
    pooled = lit.images(arrays, pixels).astype(np.float32)
    return RunContent({"cls": clustered(COUNT, lit.WIDTH, 3), "pooled": pooled}, model=model)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, content: RunContent) -> Iterator[Client]:
    with serving(_open(str(write_run(tmp_path_factory.mktemp("run"), content)), None, {})) as server:
        yield Client(server)


def test_report_explore_search_by_text(client: Client, content: RunContent, arrays: lit.Arrays) -> None:
    cosines = content.features["pooled"] @ lit.texts(arrays, [IDS])[0]
    best = np.argsort(-cosines)
    assert "words" in client.page("/").attributes("input", "name")
    pages = [client.page("/words", words=" a red house ", page=page) for page in (1, 2)]
    rows = [int(str(source).partition("row=")[2]) for page in pages for source in page.attributes("img", "src")]
    assert rows == best.tolist()
    assert "Like “a red house”" in pages[0].text
    assert "Cosine of pooled, exact search" in pages[0].text
    assert f" {cosines[best[0]]:.3f} " in pages[0].text
    assert client.request("/words?words=++")[0] == 400
    hostile = client.page("/words", words="<script>a</script>")
    assert not [tag for tag, _ in hostile.tags if tag == "script"]


def test_report_explore_says_why_no_text_can_be_searched(tmp_path: Path, content: RunContent) -> None:
    assert content.model is not None
    gone = replace(content, model=content.model.model_copy(update={"name": str(tmp_path / "gone.npz")}))
    with serving(_open(str(write_run(tmp_path / "run", gone)), None, {})) as server:
        client = Client(server)
        assert "words" in client.page("/").attributes("input", "name")
        status, _, body = client.request("/words?words=a+house")
        assert status == 500
        assert "No search by text" in body.decode()
        assert "gone.npz" in body.decode()


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
