"""Clusters and near-duplicates that were made before an update: what is gone is not shown, and the pages say so."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from report.album import Album
from report.explore_client import Client, serving
from report.html_page import Page

from pipeline.report import write_report
from pipeline.report.explore_state import open_exploration
from pipeline.report.run import open_run
from pipeline.retrieval.clustering import cluster
from pipeline.retrieval.duplicates import find_duplicates, write_duplicates
from pipeline.retrieval.store import FeatureStore

NEWER = "Made before 3 rows were added or replaced; run `patchstream"
CLUSTERS, DUPLICATES = f"{NEWER} kmeans` again.", f"{NEWER} duplicates` again before deleting."
# Of each group the last is kept: its picture is the largest. Of the first the other is replaced, of the second the one
# kept, of the third one of two others.
GROUPS, REPLACED = ([0, 1], [2, 3, 4], [5, 6, 7]), {10: 0, 11: 4, 12: 6}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outdated")
    album = Album(folder, count=10, failed={})
    for group in GROUPS:
        album.features[group] = album.features[group[0]]
    made = album.write()
    assert make_groups(made) == 10
    return made


def make_groups(run: Path) -> int:
    """Near-duplicates, and two clusters of so many rows."""
    store = FeatureStore.open(str(run))
    write_duplicates(store, find_duplicates(store, 0.999), "main", {})
    return int(cluster(store, "cls", k=2, name="two")["rows"])


def text_of(run: Path) -> str:
    write_report(str(run))
    return Page((run / "report.html").read_text()).text


@pytest.fixture(scope="module")
def updated(run: Path) -> Path:
    later = run.parent.with_name(f"{run.parent.name}-later")
    shutil.copytree(run.parent, later)
    for name in ("images", "manifest", "index"):
        shutil.rmtree(later / "out" / name)
    return Album(later, count=13, failed={}).write(replaces=REPLACED)


@pytest.fixture(scope="module")
def client(updated: Path) -> Iterator[Client]:
    with serving(open_exploration(open_run(str(updated), {}), None)) as server:
        yield Client(server)


def shown(page: Page) -> set[int]:
    return {int(str(source).partition("row=")[2]) for source in page.attributes("img", "src")}


def test_report_says_that_rows_came_since(run: Path, updated: Path) -> None:
    before, after = text_of(run), text_of(updated)
    assert "Made before" not in before
    assert "2 clusters of 10 pictures" in before
    assert "3 groups of 8 pictures, 5 of them could go." in before
    assert "2 clusters of 7 pictures" in after
    assert "1 groups of 2 pictures, 1 of them could go." in after
    assert CLUSTERS in after
    assert DUPLICATES in after


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("replaces", "clustered"), [({}, 6), (REPLACED, 3)])
def test_report_says_that_a_run_went_on_since(tmp_path: Path, replaces: dict[int, int], clustered: int) -> None:
    album = Album(tmp_path, count=13, failed={})
    album.features[2] = 0
    album.features[3] = album.features[1]
    run = album.write(replaces=replaces)
    pending = sorted((run / "images").iterdir())[1]
    pending.rename(tmp_path / "pending")
    assert make_groups(run) == clustered
    assert "Made before" not in text_of(run)
    (tmp_path / "pending").rename(pending)
    after = text_of(run)
    assert CLUSTERS.replace("3", "6") in after
    assert DUPLICATES.replace("3", "6") in after
    make_groups(run)
    assert "Made before" not in text_of(run)


def test_report_explore_shows_no_groups_of_what_is_gone(client: Client) -> None:
    page = client.page("/duplicates")
    assert "1 groups" in page.text
    assert DUPLICATES in page.text
    assert shown(page) == {5, 7}
    group = client.page("/group", name="main", id=2)
    assert shown(group) == {5, 7}
    assert DUPLICATES in group.text
    assert client.request("/group?name=main&id=0")[0] == 404
    assert "group" not in client.page("/picture", row=1).text


def test_report_explore_shows_no_clusters_of_what_is_gone(client: Client) -> None:
    page = client.page("/clusters")
    assert CLUSTERS in page.text
    rows = shown(page)
    assert rows == set(range(10)) - set(REPLACED.values())
    assert all(client.request(f"/thumbnail?row={row}")[0] == 200 for row in rows)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("record", ["{}", '{"rows": 10}', "[]"])
def test_report_a_result_that_does_not_say_when_it_was_made(updated: Path, tmp_path: Path, record: str) -> None:
    shutil.copytree(updated.parent, tmp_path / "old")
    old = tmp_path / "old" / "out"
    (old / "duplicates" / "main.json").write_text(record)
    text = text_of(old)
    assert "1 groups of 2 pictures" in text
    assert DUPLICATES not in text
    assert text.count("Made before") == 1, "the clusters alone say so"
    (old / "clusters" / "two.json").write_text(record)
    assert "Made before" not in text_of(old)
