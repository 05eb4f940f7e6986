"""`report` and `explore` of a run whose parts are put in the place of others meanwhile, or when that was cut short."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report.album import Album
from report.explore_client import Client, serving
from report.html_page import Page

from pipeline.report import catalogue, write_report
from pipeline.report.explore_state import open_exploration
from pipeline.report.run import batches, open_run
from pipeline.sinks import compaction
from pipeline.sinks.parts import part_name
from schemas.errors import OutputError

pytestmark = pytest.mark.timeout(120)

FAILED = {5: "Truncated", 11: "NotAnImage", 12: "NotAnImage"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """60 rows, 3 of them failures; two parts of images."""
    return Album(tmp_path, count=60, failed=FAILED).write()


def swap_half_done(run: Path, folder: str) -> None:
    """What a swap leaves that was killed between removing the old part and moving the new one in."""
    part = sorted((run / folder).glob("*.parquet"))[0]
    (run / "_swap" / folder).mkdir(parents=True)
    part.rename(run / "_swap" / folder / part.name)
    plan = {"remove": [], "add": [f"{folder}/{part.name}"]}
    (run / "_swap" / "plan.json").write_text(json.dumps(plan))


@pytest.mark.parametrize("folder", ["images", "failures"])
def test_report_of_a_swap_that_was_cut_short_is_refused_until_it_is_finished(
    run: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    swap_half_done(run, folder)
    monkeypatch.setattr("pipeline.settled._SWAP_S", 0.3)
    with pytest.raises(OutputError, match=r"are being rewritten[\s\S]*`patchstream compact DIR` finishes"):
        write_report(str(run))
    assert not (run / "report.html").exists()
    compaction.recover(str(run), {})
    assert "57 images, 3 failures, 0 pending." in Page(Path(write_report(str(run))).read_text()).text


@pytest.mark.parametrize("folder", ["images", "failures"])
def test_report_waits_for_a_swap_under_way(run: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    swap_half_done(run, folder)
    monkeypatch.setattr("time.sleep", lambda _: compaction.recover(str(run), {}))
    assert "57 images, 3 failures, 0 pending." in Page(Path(write_report(str(run))).read_text()).text


def test_report_explore_without_features_waits_for_a_swap_under_way(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swap_half_done(run, "images")
    with monkeypatch.context() as patched:
        patched.setattr("time.sleep", lambda _: compaction.recover(str(run), {}))
        exploration = open_exploration(open_run(str(run), {}), None)
    with serving(exploration) as server:
        assert "57 pictures" in Client(server).page("/").text


def test_report_explore_shows_pictures_after_a_compaction(run: Path) -> None:
    with serving(open_exploration(open_run(str(run), {}), None)) as server:
        client = Client(server)
        before = client.page("/picture", row=3)
        assert compaction.compact(str(run), 1 << 30, {}) == 2
        assert client.page("/picture", row=3).text == before.text
        assert "uri " in client.page("/picture", row=50).text
        assert client.request("/thumbnail?row=50")[1]["content-type"] == "image/webp"


def two_failure_parts(run: Path) -> None:
    """Leave the failures of a run in two parts, which a compaction merges."""
    (whole,) = (run / "failures").glob("*.parquet")
    (part, *_) = (run / "images").glob("*.parquet")
    table = pq.read_table(whole).replace_schema_metadata(pq.read_schema(part).metadata)
    whole.unlink()
    for piece in (table.slice(0, 2), table.slice(2)):
        pq.write_table(piece, run / "failures" / part_name(piece["row"].to_numpy()))


@pytest.mark.parametrize(
    ("page", "query", "shows"),
    [("/", {"text": "0050"}, "1 pictures"), ("/failures", {}, "NotAnImage")],
)
def test_report_explore_looks_again_where_a_compaction_falls_into_a_pass(
    run: Path, monkeypatch: pytest.MonkeyPatch, page: str, query: dict[str, str], shows: str
) -> None:
    two_failure_parts(run)
    merged: list[int] = []

    def compacted_first(*args: Any) -> Iterator[pa.RecordBatch]:
        if not merged:
            merged.append(compaction.compact(str(run), 1 << 30, {}))
        return batches(*args)

    with serving(open_exploration(open_run(str(run), {}), None)) as server:
        monkeypatch.setattr(catalogue, "batches", compacted_first)
        found = Client(server).page(page, **query)
    assert merged == [4]
    assert shows in found.text


def test_report_explore_does_not_mix_in_another_run(run: Path) -> None:
    with serving(open_exploration(open_run(str(run), {}), None)) as server:
        for part in (run / "images").iterdir():
            part.unlink()
        Album(run.parent, count=60, failed=FAILED).write(parts=1, image_column="other")
        status, _, body = Client(server).request("/picture?row=3")
    assert status == 500
    assert "became another while it was read" in body.decode()
