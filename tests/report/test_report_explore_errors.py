"""`explore` when what it reads changes, breaks or is closed to it: a page says so, and the next one is served."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report.album import Album, damage_column
from report.explore_client import Client, searcher_of, serving
from support.runs import jpeg

from pipeline.report.explore_state import open_exploration
from pipeline.report.run import open_run

_SIGNED = "s3://bucket/a?X-Amz-Signature=s3cr3t"


def test_report_explore_of_a_damaged_page(tmp_path: Path) -> None:
    run = Album(tmp_path, count=40, failed={}).write()
    with serving(open_exploration(open_run(str(run), {}), None)) as server:
        damage_column(sorted((run / "images").glob("*.parquet"))[1], "uri")
        client = Client(server)
        for target in ("/?text=002", "/picture?row=33"):
            status, _, body = client.request(target)
            assert status == 500
            assert "patchstream verify" in body.decode()
        assert client.request("/picture?row=3")[0] == 200


def test_report_explore_of_a_store_that_is_closed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(str(Album(tmp_path, count=4, failed={2: "NotAnImage"}).write()), {})

    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError(f"{_SIGNED}: the provided token has expired")

    with serving(open_exploration(run, None)) as server:
        monkeypatch.setattr(type(run.fs), "open", deny)
        status, _, body = Client(server).request("/failures")
    assert status == 500
    assert "the provided token has expired" in body.decode()
    assert "PermissionError" in caplog.text
    assert "s3cr3t" not in body.decode() + caplog.text


def test_report_explore_of_a_model_that_does_not_run(tmp_path: Path) -> None:
    def out_of_memory(data: bytes) -> np.ndarray:
        raise RuntimeError("not enough memory")

    album = Album(tmp_path, count=4, failed={})
    searcher = replace(searcher_of(album), embed=out_of_memory)
    with serving(open_exploration(open_run(str(album.write()), {}), searcher)) as server:
        status, _, body = Client(server).upload(jpeg((1, 2, 3)))
    assert status == 500
    assert "not enough memory" in body.decode()


def test_report_explore_while_an_update_adds_rows(tmp_path: Path) -> None:
    run = Album(tmp_path / "a", count=12, failed={}).write()
    larger = Album(tmp_path / "b", count=20, failed={}).write(parts=10)
    with serving(open_exploration(open_run(str(run), {}), None)) as server:
        for part in sorted((larger / "images").glob("*.parquet"))[6:]:
            shutil.copy(part, run / "images")
        page = Client(server).page("/", text="jpg")
        assert "12 pictures" in page.text
