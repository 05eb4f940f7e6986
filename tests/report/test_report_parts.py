"""The pieces of the page: bins, times, projection, lookup of rows."""

import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report.album import Album, add_clusters, add_duplicates, big_run
from sklearn.decomposition import PCA

from pipeline.progress import duration
from pipeline.report import catalogue, groups, projection, write_report
from pipeline.report.charts import bars, counter_bars, score_bars, side_bars, stage_times
from pipeline.report.explore_state import Thumbnails
from pipeline.report.groups import load_clusterings, load_duplicates
from pipeline.report.lookup import Piece, RowLookup, pieces
from pipeline.report.projection import project, sample_features
from pipeline.report.run import open_run
from pipeline.report.scan import ABSENT, NO_LABEL, ImageScan, scan_images
from pipeline.report.text import percent, rate, short_name, thousands
from pipeline.report.view import Pictures, duplicate_sheets
from schemas.attempt import AttemptRecord, StageSeconds


def test_report_sides_in_two_bins_an_octave() -> None:
    sides = np.zeros(65_536, np.int64)
    sides[[100, 127, 128, 200, 300, 400, 500, 600, 1000, 65_535]] = 1
    shown = {bar.label: bar.count for bar in side_bars(sides)}
    assert shown["96–127 px"] == 2
    assert shown["128–191 px"] == 1
    assert shown["192–255 px"] == 1
    assert sum(shown.values()) == 10
    assert "64–95 px" not in shown


def test_report_few_sides_as_they_are() -> None:
    sides = np.zeros(65_536, np.int64)
    sides[[64, 640]] = [3, 9]
    assert [(bar.label, bar.count, round(bar.share, 2), bar.width) for bar in side_bars(sides)] == [
        ("64 px", 3, 0.25, pytest.approx(100 / 3)),
        ("640 px", 9, 0.75, 100.0),
    ]


def test_report_scores_in_ten_bins() -> None:
    shown = score_bars(np.array([0.0, 0.05, 0.95, 1.0, np.nan], np.float32))
    assert [bar.count for bar in shown] == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert score_bars(np.full(3, np.nan, np.float32)) == []


def test_report_rest_in_one_bar() -> None:
    shown = counter_bars({"a": 5, "b": 7, "c": 1, "d": 2, "never": 0}, 2)
    assert [(bar.label, bar.count) for bar in shown] == [("b", 7), ("a", 5), ("2 more", 3)]
    assert [bar.width for bar in shown] == [100, pytest.approx(500 / 7), 0]
    assert [bar.share for bar in shown] == [7 / 15, 5 / 15, 3 / 15]
    assert bars([]) == []


def test_report_stage_times_fill_the_whole() -> None:
    def attempt(**seconds: float) -> AttemptRecord:
        work = StageSeconds(**seconds)
        return AttemptRecord(attempt=1, shard_index=0, shard_count=1, started="x", host="h", pid=1, stage_seconds=work)

    times = stage_times([attempt(fetch=1, predict=2), attempt(fetch=1)])
    assert [(time.name, time.seconds, time.start, time.width) for time in times if time.seconds] == [
        ("fetch", 2.0, 0.0, 50.0),
        ("predict", 2.0, 50.0, 50.0),
    ]
    assert stage_times([attempt()]) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.04, "0.0 s"), (9.96, "10.0 s"), (59.6, "60 s"), (200, "3 min 20 s"), (7505, "2 h 05 min")],
)
def test_report_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_report_numbers() -> None:
    assert thousands(1234567) == "1\u202f234\u202f567"
    assert [percent(share) for share in (0, 0.00001, 0.5, 0.99999, 1)] == ["0.0%", "<0.1%", "50.0%", "99.9%", "100%"]
    assert [rate(value) for value in (None, 2.345, 1234.5)] == ["–", "2.3", "1\u202f234"]


def test_report_projection_is_the_principal_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "_has_umap", lambda: False)
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((200, 3)) @ rng.standard_normal((3, 12)) + 3).astype(np.float32)
    found = project(np.arange(200), features, 0)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = PCA(2).fit_transform(unit.astype(np.float64))
    for axis in range(2):
        assert abs(np.corrcoef(found.points[:, axis], expected[:, axis])[0, 1]) > 0.999999
    assert found.points.min() == 0
    assert found.points.max() == 1
    assert found.method.startswith("PCA, ")


@pytest.mark.slow
def test_report_projection_by_umap_keeps_clusters_together() -> None:
    pytest.importorskip("umap", reason="an optional dependency: pip install 'patchstream[umap]'")
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((5, 96))
    features = (np.repeat(centres, 20, axis=0) + 0.2 * rng.standard_normal((100, 96))).astype(np.float32)
    found = project(np.arange(100), features, 0)
    assert found.method == "UMAP, cosine distance"
    away = np.linalg.norm(found.points[:, None] - found.points[None], axis=2)
    np.fill_diagonal(away, np.inf)
    assert (away.argmin(axis=1) // 20 == np.arange(100) // 20).all()


def test_report_projection_of_equal_points_is_finite() -> None:
    found = project(np.arange(5), np.ones((5, 4), np.float32), 0)
    assert np.isfinite(found.points).all()
    assert len(project(np.arange(2), np.ones((2, 4), np.float32), 0).rows) == 0


def test_report_features_go_with_their_rows(tmp_path: Path) -> None:
    album = Album(tmp_path)
    run = open_run(str(album.write()), {})
    rows, features, *_ = sample_features(run, "cls", scan_images(run), 20, 1)
    place = {row: index for index, row in enumerate(album.rows)}
    assert len(rows) == 20
    assert np.all(np.diff(rows) > 0)
    np.testing.assert_array_equal(features, album.features[[place[row] for row in rows.tolist()]])


def test_report_reads_features_within_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(str(big_run(tmp_path, 20_000, 8)), {})
    monkeypatch.setattr(projection, "_BUDGET_BYTES", 1)
    read: list[tuple[str, int]] = []
    original = projection._features_of
    monkeypatch.setattr(
        projection,
        "_features_of",
        lambda run, piece, *rest: read.append((piece.path, piece.group)) or original(run, piece, *rest),
    )
    rows, features, chosen, there = sample_features(run, "cls", scan_images(run), 500, 0)
    assert len(pieces(run, "images")) == there > 16
    assert chosen == 8
    assert len(set(read)) == 8
    assert features.shape == (500, 8)
    assert len(np.unique(rows // 1024)) > 3


def test_report_draws_points_without_a_copy_of_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(str(big_run(tmp_path, 20_000, 8)), {})
    monkeypatch.setattr(projection, "_BUDGET_BYTES", 1)
    rows = 4_000_000
    scan = ImageScan(np.full(rows, NO_LABEL, np.int32), np.zeros(rows, np.float32))
    tracemalloc.start()
    try:
        found = sample_features(run, "cls", scan, 500, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.rows) == 500
    assert peak < 8 * rows


def test_report_draws_points_of_scanned_images_alone(tmp_path: Path) -> None:
    run = open_run(str(big_run(tmp_path, 600, 4)), {})
    codes = np.full(500, NO_LABEL, np.int32)
    codes[::2] = ABSENT
    found = sample_features(run, "cls", ImageScan(codes, np.zeros(500, np.float32)), 600, 0)
    assert found.rows.tolist() == list(range(1, 500, 2))


def test_report_lookup_reads_only_what_holds_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    album = Album(tmp_path)
    run = open_run(str(album.write()), {})
    lookup = RowLookup(run, "images", ["row", "uri", "width"])
    opened: list[str] = []
    original = lookup._read
    monkeypatch.setattr(lookup, "_read", lambda piece: opened.append(piece.path) or original(piece))
    found = lookup.get([album.rows[0], album.rows[1], 5, 999])
    assert {row: record["width"] for row, record in found.items()} == {0: 64, 1: 65}
    assert len(opened) == 1
    assert lookup.get([]) == {}


def test_report_lookup_reads_row_groups_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(str(big_run(tmp_path, 4000, 4, group_rows=1000)), {})
    lookup = RowLookup(run, "images", ["row", "uri"])
    together = threading.Barrier(4)
    original = lookup._read

    def read(piece: Piece) -> Any:
        together.wait(30)
        return original(piece)

    monkeypatch.setattr(lookup, "_read", read)
    found = lookup.get([3999, 1, 1001, 2001, 2002])
    assert {row: record["uri"] for row, record in found.items()} == {
        row: f"memory://photo-{row:07d}.jpg" for row in (1, 1001, 2001, 2002, 3999)
    }


def test_report_asks_the_manifest_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Album(tmp_path, count=6, failed={}).write()
    asked: list[int] = []
    original = RowLookup.get
    monkeypatch.setattr(RowLookup, "get", lambda self, rows: asked.append(len(rows)) or original(self, rows))
    write_report(str(directory))
    assert asked == [6]


def test_report_groups_hold_nearest_first(tmp_path: Path) -> None:
    album = Album(tmp_path, count=9, failed={})
    run = album.write()
    add_clusters(run, list(range(8, -1, -1)), [row % 2 for row in range(8, -1, -1)])
    opened = open_run(str(run), {})
    (grouping,) = load_clusterings(opened, scan_images(opened))
    assert grouping.ids.tolist() == [0, 1]
    assert grouping.rows[grouping.members(1)].tolist() == [1, 3, 5, 7]
    assert grouping.sizes.tolist() == [5, 4]


def test_report_one_thumbnail_made_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Thumbnails(open_run(str(Album(tmp_path, count=2, failed={}).write()), {}))
    make = kept._source.thumbnails
    together = threading.Barrier(2)

    def both(*arguments: Any) -> Any:
        made = make(*arguments)
        together.wait(10)
        return made

    monkeypatch.setattr(kept._source, "thumbnails", both)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: kept.get(0, 64), range(2))
    assert first == second
    assert kept._bytes == len(first[1])
    kept.close()


def test_report_reads_only_the_groupings_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    album = Album(tmp_path, count=6, failed={})
    directory = album.write()
    for name in "abcde":
        add_clusters(directory, album.rows, [0] * 6, name)
        add_duplicates(directory, [album.rows[:2]], name)
    read: list[str] = []
    original = groups.batches
    monkeypatch.setattr(groups, "batches", lambda fs, paths, *rest: read.extend(paths) or original(fs, paths, *rest))
    write_report(str(directory))
    assert [path.rpartition("/out/")[2].rpartition("/")[0] for path in read] == [
        f"{kind}/{name}" for kind in ("clusters", "duplicates") for name in "abc"
    ]


def test_report_groups_by_size_keep_their_rows(tmp_path: Path) -> None:
    album = Album(tmp_path, count=12, failed={})
    directory = album.write()
    add_duplicates(directory, [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9, 10]])
    opened = open_run(str(directory), {})
    (grouping,) = load_duplicates(opened, scan_images(opened))
    assert grouping.ids.tolist() == [3, 1, 0, 2]
    assert [grouping.rows[grouping.members(index)].tolist() for index in range(4)] == [
        [8, 7, 9, 10], [3, 2, 4], [1, 0], [6, 5],
    ]  # fmt: skip
    assert grouping.keep.tolist() == [True, False, False, False, True, False, False, True, False, True, False]


def test_report_makes_pictures_only_of_those_it_shows_of_a_group(tmp_path: Path) -> None:
    directory = Album(tmp_path, count=12, failed={}).write()
    add_duplicates(directory, [range(12)])
    run = open_run(str(directory), {})
    (grouping,) = load_duplicates(run, scan := scan_images(run))
    made, pictures = [], Pictures(scan, {}, {})
    (sheet,) = duplicate_sheets(grouping, [0], 3, lambda row, **more: made.append(row) or pictures(row, **more))
    assert (sheet.size, [picture.row for picture in sheet.pictures], made) == (12, [1, 0, 2], [1, 0, 2])


def test_report_answers_are_kept_within_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_KEPT_BYTES", 2 * 400 * 2)  # two answers of 400 rows in two bytes each
    run = open_run(str(big_run(tmp_path, 400, 4)), {})
    kept = catalogue.Catalogue(run, scan_images(run))
    for text in ("memory", "photo", "jpg", "label"):
        assert kept.rows(catalogue.Filter(text=text)).tolist() == list(range(400))
    assert [filter_.text for filter_ in kept._answers] == ["jpg", "label"]
    monkeypatch.setattr(catalogue, "_KEPT_BYTES", 1)
    kept.rows(catalogue.Filter(order="best"))
    assert list(kept._answers) == [catalogue.Filter(order="best")]


def test_captions_show_the_end_of_an_address() -> None:
    assert short_name("s3://b/a.jpg", 34) == "s3://b/a.jpg"
    shown = [short_name(f"s3://a-bucket/with/a/long/prefix/train-000{n}.tar#member-{n}.jpg", 34) for n in range(2)]
    assert shown == ["…refix/train-0000.tar#member-0.jpg", "…refix/train-0001.tar#member-1.jpg"]
