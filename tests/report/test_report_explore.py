"""`explore` over real HTTP: what the pages show, and what the server refuses."""

import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from report.album import HOSTILE_NAMES, LABELS, Album
from report.explore_client import Client, searcher_of, serving
from report.html_page import Page
from support.runs import jpeg

from jobs.explore import _open
from pipeline.report import explore_pages
from pipeline.report.explore_state import open_exploration
from pipeline.report.run import open_run
from pipeline.retrieval.matrix import Matrix
from pipeline.retrieval.store import FeatureStore

TOKEN = "a long; enough token%&"


def shown_rows(page: Page) -> list[int]:
    sources = page.attributes("img", "src")
    return [int(found[1]) for found in (re.search(r"row=(\d+)$", str(source)) for source in sources) if found]


def test_report_explore_pages_through_all_pictures(client: Client, explored: tuple[Album, Path]) -> None:
    album, _ = explored
    pages = [shown_rows(client.page("/", page=number)) for number in (1, 2, 3)]
    assert [len(rows) for rows in pages] == [60, 60, 27]
    assert [row for rows in pages for row in rows] == album.rows
    assert shown_rows(client.page("/", page=99)) == pages[2]
    assert shown_rows(client.page("/", page="x")) == pages[0]


def test_report_explore_follows_its_own_links(client: Client) -> None:
    seen, queue = set(), ["/"]
    while queue and len(seen) < 60:
        target = queue.pop(0)
        seen.add(target)
        status, headers, body = client.request(target.partition("#")[0])
        assert status in (200, 204), target
        if headers["content-type"].startswith("text/html"):
            links = [str(link) for link in Page(body.decode()).attributes("a", "href")]
            assert all(link.startswith(("/", "#")) for link in links)
            queue += [link for link in links if link.startswith("/") and link not in seen and link not in queue]
    assert {"/clusters", "/duplicates", "/failures"} <= seen


@pytest.mark.parametrize("label", LABELS)
def test_report_explore_filters_by_label(client: Client, explored: tuple[Album, Path], label: str) -> None:
    album, _ = explored
    wanted = [row for row, code in zip(album.rows, album.labels, strict=True) if LABELS[code] == label]
    page = client.page("/", label=label)
    assert shown_rows(page) == wanted
    assert page.attributes("option", "selected") != []


@pytest.mark.parametrize("label", ["no such label", *LABELS])
def test_report_explore_shows_the_label_that_is_filtered_by(
    client: Client, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    monkeypatch.setattr(explore_pages, "_LISTED_LABELS", 2)
    page = client.page("/", label=label)
    chosen = [attrs["value"] for tag, attrs in page.tags if tag == "option" and "selected" in attrs]
    assert chosen == [label, "row"]
    assert f"{label} ({len(shown_rows(page))})" in page.text


def test_report_explore_links_labels_that_can_be_filtered_by(client: Client, explored: tuple[Album, Path]) -> None:
    album, _ = explored
    page = client.page("/picture", row=album.rows[7])
    targets = [str(link) for link in page.attributes("a", "href") if "label=" in str(link)]
    assert targets == [f"/?{urlencode({'label': LABELS[album.labels[7]]})}"]
    assert "second best" in page.text


def test_report_explore_filters_by_text(client: Client) -> None:
    assert shown_rows(client.page("/", text="0003")) == [3]
    assert shown_rows(client.page("/", text="0003", label="no such label")) == []
    assert shown_rows(client.page("/", text="no such thing")) == []
    assert shown_rows(client.page("/", text="[unclosed (.*")) == []


def test_report_explore_text_finds_labels_too(client: Client, explored: tuple[Album, Path]) -> None:
    album, _ = explored
    green = [row for row, code in zip(album.rows, album.labels, strict=True) if LABELS[code] == "green"]
    assert shown_rows(client.page("/", text="GREEN")) == green


def test_report_explore_orders_by_score(client: Client, explored: tuple[Album, Path]) -> None:
    album, _ = explored
    best = [album.rows[index] for index in np.argsort(-album.scores, kind="stable")[:60]]
    assert shown_rows(client.page("/", order="best")) == best
    worst = [album.rows[index] for index in np.argsort(album.scores, kind="stable")[:60]]
    assert shown_rows(client.page("/", order="worst")) == worst
    assert shown_rows(client.page("/", order="; drop table")) == album.rows[:60]


def test_report_explore_shows_hostile_names_as_text(client: Client) -> None:
    first = client.page("/")
    for name in HOSTILE_NAMES:
        assert re.sub(r"\s+", " ", name) in first.text
    for page in (first, client.page("/picture", row=1), client.page("/clusters"), client.page("/failures")):
        assert not [tag for tag, _ in page.tags if tag in {"script", "svg", "style", "iframe"}]
        assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on") or name == "style"]
        assert all(str(link).startswith(("/", "#")) for link in page.attributes("a", "href"))
    reflected = client.page("/", text='"><script>alert(1)</script>', label="'><b>")
    assert not [tag for tag, _ in reflected.tags if tag in {"script", "b"}]


def test_report_explore_more_like_this(client: Client, explored: tuple[Album, Path]) -> None:
    album, _ = explored
    unit = album.features / np.linalg.norm(album.features, axis=1, keepdims=True)
    row, index = album.rows[7], 7
    nearest = [album.rows[at] for at in np.argsort(-(unit @ unit[index])) if at != index]
    page = client.page("/picture", row=row)
    assert shown_rows(page)[:20] == nearest[:20]
    assert row not in shown_rows(page)
    assert f"uri {album.folder}" in page.text
    assert f"cluster {album.labels[index]} of colours" in page.text


def test_report_explore_says_why_nothing_is_like_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    album = Album(tmp_path, count=8, failed={})
    album.features[1] = 0
    run = album.write()
    part = sorted((run / "images").iterdir())[1]
    part.rename(tmp_path / "part")
    load = FeatureStore.load

    def load_before_a_part_comes(store: FeatureStore, feature: str) -> Matrix:
        matrix = load(store, feature)
        (tmp_path / "part").rename(part)
        return matrix

    monkeypatch.setattr(FeatureStore, "load", load_before_a_part_comes)
    with serving(_open(str(run), None, {})) as server:
        client = Client(server)
        assert "zero or not finite" in client.page("/picture", row=1).text
        late = client.page("/picture", row=7).text
    assert "came after the vectors were read; start explore again" in late
    assert "zero or not finite" not in late


def test_report_explore_rows_that_are_no_images(client: Client) -> None:
    for target in (
        "/picture?row=5",
        "/picture?row=99999",
        "/picture?row=-1",
        "/picture?row=1e3",
        "/picture",
        "/thumbnail",
    ):
        assert client.request(target)[0] == 404, target


def test_report_explore_thumbnails(client: Client) -> None:
    status, headers, body = client.request("/thumbnail?row=1")
    assert (status, headers["content-type"]) == (200, "image/webp")
    assert body[8:12] == b"WEBP"
    assert headers["cache-control"] == "no-store"  # the next run that is explored has other pictures there
    assert client.request("/thumbnail?row=1")[2] == body
    assert client.request("/thumbnail?row=1&size=large")[0] == 200
    status, headers, empty = client.request("/thumbnail?row=1", method="HEAD")
    assert (status, headers["content-length"], empty) == (200, str(len(body)), b"")


def test_report_explore_thumbnail_that_cannot_be_read(tmp_path: Path) -> None:
    album = Album(tmp_path, count=3, failed={})
    run = album.write()
    for path in album.folder.glob("0001*"):
        path.unlink()
    with serving(open_exploration(open_run(str(run), {}), None)) as server:
        status, headers, body = Client(server).request("/thumbnail?row=1")
        assert (status, headers["content-type"], headers["cache-control"]) == (200, "image/svg+xml", "no-store")
        assert b"cannot be shown" in body
        assert b"<img" not in body


def test_report_explore_clusters_and_groups(client: Client, explored: tuple[Album, Path]) -> None:
    album, _ = explored
    page = client.page("/clusters")
    assert f"{len(np.unique(album.labels))} clusters" in page.text
    cluster = int(album.labels[0])
    members = [row for row, code in zip(album.rows, album.labels, strict=True) if code == cluster]
    assert shown_rows(client.page("/cluster", name="colours", id=cluster)) == members
    assert "2 groups" in client.page("/duplicates").text
    assert "kept 0.990 0.970" in client.page("/duplicates").text
    assert shown_rows(client.page("/group", name="near", id=1))[0] == album.rows[11]
    for target in ("/cluster?name=colours&id=99", "/cluster?name=..%2F..%2Fimages&id=0", "/group?name=colours&id=0"):
        assert client.request(target)[0] == 404


def test_report_explore_failures(client: Client) -> None:
    page = client.page("/failures")
    assert "3 failures" in page.text
    assert page.text.count("NotAnImage row") == 2


def test_report_explore_search_by_picture(client: Client, explored: tuple[Album, Path]) -> None:
    album, _ = explored
    data = jpeg((1, 2, 3))
    status, headers, _ = client.upload(data, name='"><script>.jpg')
    assert status == 303
    rows = shown_rows(client.page(headers["location"].partition("?")[0], id=headers["location"].partition("=")[2]))
    assert rows[0] == album.rows[len(data) % 3]
    assert len(rows) == 60


def test_report_explore_upload_that_is_no_picture(client: Client) -> None:
    status, _, body = client.upload(b"GIF?")
    assert status == 400
    assert "this is &lt;b&gt;no&lt;/b&gt; picture" in body.decode()
    assert client.upload(b"")[0] == 400
    assert client.request("/search", method="POST", body=b"x", headers={"Content-Type": "text/plain"})[0] == 400
    assert client.request("/found?id=guessed")[0] == 404


def test_report_explore_without_features_or_model(explored: tuple[Album, Path]) -> None:
    album, run = explored
    with serving(open_exploration(open_run(str(run), {}), None)) as server:
        client = Client(server)
        assert "More like this" not in client.page("/").text
        assert client.upload(jpeg((1, 2, 3)))[0] == 404
    searcher = replace(searcher_of(album), embed=None)
    with serving(open_exploration(open_run(str(run), {}), searcher)) as server:
        page = Client(server).page("/")
        assert "More like this" in page.text
        assert not page.attributes("input", "type")


def test_report_explore_shows_no_replaced_rows(tmp_path: Path) -> None:
    run = Album(tmp_path, count=12, failed={}).write(replaces={10: 0, 11: 1})
    with serving(open_exploration(open_run(str(run), {}), None)) as server:
        assert shown_rows(Client(server).page("/")) == list(range(2, 12))
        assert Client(server).request("/picture?row=0")[0] == 404


def test_report_explore_shows_no_failures_of_replaced_rows(tmp_path: Path) -> None:
    run = Album(tmp_path, count=12, failed={1: "Truncated", 5: "NotFound"}).write(replaces={10: 0, 11: 1})
    with serving(open_exploration(open_run(str(run), {}), None)) as server:
        page = Client(server).page("/failures")
        assert "NotFound" in page.text
        assert "Truncated" not in page.text


def test_report_explore_shows_the_users_columns(tmp_path: Path) -> None:
    run = Album(tmp_path, count=4, failed={}).write(user={"shop": ["<i>a</i>", "b", None, "d"]})
    with serving(open_exploration(open_run(str(run), {}), None)) as server:
        assert "shop <i>a</i>" in Client(server).page("/picture", row=0).text
