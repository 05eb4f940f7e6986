"""Thumbnails out of tars and tables that are not what they were when they were listed: no other picture."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report.album import tar_of
from support.faults import Rule
from support.http_server import HttpServer
from support.runs import RunContent, jpeg, write_run
from support.shards import listed

from pipeline.report.run import open_run
from pipeline.report.thumbnails import Thumbnail, Thumbnailer

pytestmark = pytest.mark.timeout(120)
RED, BLUE = jpeg((210, 20, 20)), jpeg((20, 20, 210))


def listed_run(folder: Path, source: str, options: Mapping[str, Any] | None = None) -> Thumbnailer:
    """The thumbnails of a run over `source`, as a run lists it now."""
    columns = listed(source, options).select(["uri", "container", "offset", "length", "etag"]).to_pydict()
    places = list(zip(columns["container"], columns["offset"], columns["length"], strict=True))
    features = {"cls": np.ones((len(places), 4), np.float32)}
    content = RunContent(features, uris=columns["uri"], parts=1, containers=places, etags=columns["etag"])
    return Thumbnailer(open_run(str(write_run(folder / "run", content)), options or {}))


def shown(source: Thumbnailer, rows: int) -> list[Thumbnail]:
    found = source.thumbnails(range(rows), 64, timeout_s=60)
    return [found[row] for row in range(rows)]


def is_refused(thumbnail: Thumbnail) -> bool:
    return thumbnail.data is None and "has changed since it was listed" in thumbnail.reason


def table_of(path: Path, pictures: list[bytes]) -> None:
    pq.write_table(pa.table({"image": pictures}), path)


def test_a_table_that_was_rewritten_shows_no_other_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table_of(path, [RED, BLUE])
    source = listed_run(tmp_path, str(path))
    path.touch()
    assert all(thumbnail.data for thumbnail in shown(source, 2))
    before = path.stat().st_size
    table_of(path, [BLUE, RED, jpeg((20, 210, 20))])
    assert path.stat().st_size != before, "the size is what tells on a disk"
    assert [is_refused(thumbnail) for thumbnail in shown(source, 2)] == [True, True]


@pytest.mark.parametrize("kind", ["s3", "gs"])
@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_what_was_rewritten_in_a_store_shows_no_other_picture(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, suffix: str
) -> None:
    """With as many bytes as before, so that only the store tells."""
    store = request.getfixturevalue({"s3": "s3_server", "gs": "gcs_server"}[kind])
    size = max(len(RED), len(BLUE))
    red, blue = RED.ljust(size, b"\0"), BLUE.ljust(size, b"\0")

    def packed(*pictures: bytes) -> bytes:
        path = tmp_path / f"a.{suffix}"
        if suffix == "tar":
            tar_of(path, {f"{number}.jpg": picture for number, picture in enumerate(pictures)})
        else:
            pq.write_table(pa.table({"image": pictures}), path, compression="none", use_dictionary=False)
        return path.read_bytes()

    bucket = store.make_bucket()
    before, after = packed(red, blue), packed(blue, red)
    assert len(before) == len(after)
    address = store.put(bucket, f"a.{suffix}", before)
    source = listed_run(tmp_path, address, store.storage_options)
    assert all(thumbnail.data for thumbnail in shown(source, 2))
    store.put(bucket, f"a.{suffix}", after)
    assert [is_refused(thumbnail) for thumbnail in shown(source, 2)] == [True, True]


def test_a_tar_whose_members_changed_places_shows_no_other_picture(tmp_path: Path) -> None:
    path, size = tmp_path / "a.tar", max(len(RED), len(BLUE))
    members = {"red.jpg": RED.ljust(size, b"\0"), "blue.jpg": BLUE.ljust(size, b"\0")}
    tar_of(path, members)
    source, before = listed_run(tmp_path, str(path)), path.stat().st_size
    path.touch()
    assert all(thumbnail.data for thumbnail in shown(source, 2))
    tar_of(path, dict(reversed(members.items())))
    assert path.stat().st_size == before
    assert [is_refused(thumbnail) for thumbnail in shown(source, 2)] == [True, True]


def test_a_tar_that_grew_or_was_cut_shows_no_other_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    tar_of(path, {"red.jpg": RED, "blue.jpg": BLUE})
    source = listed_run(tmp_path, str(path))
    for content in (path.read_bytes() + bytes(10_240), bytes(100)):
        path.write_bytes(content)
        assert [is_refused(thumbnail) for thumbnail in shown(source, 2)] == [True, True]


def test_a_tar_on_a_web_server_without_ranges(tmp_path: Path, http_server: Callable[..., HttpServer]) -> None:
    (tmp_path / "web").mkdir()
    path = tmp_path / "web" / "a.tar"
    tar_of(path, {"red.jpg": RED, "blue.jpg": BLUE})
    server = http_server(tmp_path / "web", [Rule("ignore_range")])
    source = listed_run(tmp_path, server.url_of("a.tar"))
    assert all(thumbnail.data for thumbnail in shown(source, 2))
    tar_of(path, {"green.jpg": RED, "white.jpg": BLUE})
    assert [is_refused(thumbnail) for thumbnail in shown(source, 2)] == [True, True]
