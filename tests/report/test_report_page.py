"""`write_report`: what stands on the page, and that nothing from outside becomes markup."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from report.album import HOSTILE_NAMES, LABELS, Album, add_attempts, add_clusters, big_run, full_run
from report.html_page import Page
from support.s3 import S3Server

from pipeline.report import write_report
from pipeline.report.lookup import RowLookup
from pipeline.report.page import _choose
from pipeline.report.run import open_run
from pipeline.report.scan import scan_images
from pipeline.storage import filesystem
from schemas.errors import OutputError


def page_of(run: Path, **options: int) -> Page:
    return Page(Path(write_report(str(run), **options)).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Album, Page]:
    album = Album(tmp_path_factory.mktemp("full"))
    run = full_run(album)
    return album, page_of(run)


def test_report_needs_nothing_else(full: tuple[Album, Page]) -> None:
    _, page = full
    assert all(str(source).startswith("data:image/webp;base64,") for source in page.attributes("img", "src"))
    assert all(str(target).startswith("#") for target in page.attributes("a", "href"))
    assert not page.attributes("link", "href")
    assert not page.attributes("script", "src")
    assert {str(target)[1:] for target in page.attributes("a", "href")} <= page.ids()


def test_report_hostile_names_are_text(full: tuple[Album, Page]) -> None:
    _, page = full
    for name in HOSTILE_NAMES:
        assert re.sub(r"\s+", " ", name) in page.text
    attributes = [(tag, name) for tag, attrs in page.tags for name in attrs]
    assert [(tag, name) for tag, name in attributes if name.startswith("on") or name == "style"] == []
    assert [kind for kind, _ in page.tags if kind in {"script", "svg", "style"}].count("script") == 2
    values = [value or "" for _, attrs in page.tags for name, value in attrs.items() if name in {"href", "src"}]
    assert not [value for value in values if value.strip().lower().startswith("javascript:")]
    assert "49" not in [span for span in page.text.split() if span == "49"]


def test_report_policy_allows_exactly_what_is_inline(full: tuple[Album, Page]) -> None:
    _, page = full
    policy = next(
        str(attrs["content"]) for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    )

    def digest(text: str) -> str:
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    assert f"style-src '{digest(page.inline['style'][0])}'" in policy
    assert f"script-src '{digest(page.inline['script'][-1])}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_report_counts(full: tuple[Album, Page]) -> None:
    album, page = full
    assert "Rows asked for 60" in page.text
    assert "57 images, 3 failures, 0 pending." in page.text
    assert "NotAnImage 2 images in decode 0 retryable" in page.text
    assert "Truncated 1 image in decode" in page.text
    assert page.text.count("NotAnImage in /") == 2
    most = np.bincount(album.labels).max()
    label = re.sub(r"\s+", " ", LABELS[int(np.bincount(album.labels).argmax())])
    assert f"First label {label} {most} {most / 57:.1%}" in page.text
    assert "landscape 57 100%" in page.text
    assert "96–127 px 28" in page.text
    assert "Images per second 2.9 with start-up Wall time 20 s" in page.text  # (21 + 37) images in 2 × 10 s
    assert "decode 8.0 s 38.1%" in page.text
    assert "interrupted" in page.text


@pytest.mark.parametrize(
    ("second", "speed", "wall"), [("10:00:06", "3.6", "16 s"), ("10:00:00", "5.8", "10 s"), ("11:00:00", "2.9", "20 s")]
)
def test_report_counts_the_time_that_shards_share_once(tmp_path: Path, second: str, speed: str, wall: str) -> None:
    run = Album(tmp_path, count=6, failed={}).write()
    add_attempts(run)  # 21 and 37 images in 10 s each
    path = run / "attempts" / "2.json"
    attempt = json.loads(path.read_text()) | {"started": f"2026-01-01T{second}+00:00", "shard_index": 1}
    path.write_text(json.dumps(attempt))
    assert f"Images per second {speed} with start-up Wall time {wall} 2 attempts" in page_of(run).text


def test_report_pictures_carry_their_own_label(full: tuple[Album, Page]) -> None:
    album, page = full
    label_of = dict(zip(album.rows, album.labels.tolist(), strict=True))
    shown = [
        (int(str(attrs["data-row"])), str(attrs["alt"]))
        for kind, attrs in page.tags
        if kind == "img" and "alt" in attrs
    ]
    assert shown
    assert set(page.rows()) <= set(album.rows)
    for row, alternative in shown:
        assert alternative.startswith(LABELS[label_of[row]])
    points = page.map_data()["points"]
    assert {point["row"]: point["label"] for point in points} == {row: LABELS[label_of[row]] for row in album.rows}


def test_report_clusters_and_duplicates(full: tuple[Album, Page]) -> None:
    album, page = full
    for cluster, size in enumerate(np.bincount(album.labels, minlength=len(LABELS))):
        if size:
            assert re.search(
                rf"Cluster {cluster} {size} {re.escape(re.sub(chr(92) + 's+', ' ', LABELS[cluster]))} 100%", page.text
            )
    assert "2 groups of 7 pictures, 5 of them could go." in page.text
    assert "Group 1 5 kept 0.990 0.970" in page.text
    assert page.text.index("Group 1 5") < page.text.index("Group 0 2")


def test_report_without_groups_has_no_such_sections(tmp_path: Path) -> None:
    page = page_of(Album(tmp_path, count=8, failed={}).write())
    assert {"clusters", "duplicates"}.isdisjoint(page.ids())
    assert "No image failed." in page.text
    assert "No attempt has been recorded yet." in page.text


def test_report_shows_the_largest_of_many_clusters(tmp_path: Path) -> None:
    album = Album(tmp_path, count=130, failed={})
    run = album.write()
    add_clusters(run, album.rows, [min(row, 60) for row in album.rows])
    page = page_of(run)
    assert "61 clusters of 130 pictures, the 48 largest are shown" in page.text
    assert "Cluster 60 70" in page.text


def test_report_is_drawn_from_the_seed(tmp_path: Path) -> None:
    run = Album(tmp_path, count=40, failed={}).write()
    first, again, other = (page_of(run, thumbnails=6, seed=seed) for seed in (3, 3, 4))
    assert first.rows() == again.rows()
    assert len(first.rows()) == 6
    assert first.rows() != other.rows()


def test_report_shows_more_pictures_than_the_map_has_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.report.page._MAP_POINTS", 10)
    run = Album(tmp_path, count=40, failed={}).write()
    for asked, shown in ((25, 25), (99, 40)):
        page = page_of(run, thumbnails=asked)
        assert len(set(page.rows())) == shown
        assert f"{shown} of 40, drawn at random" in page.text


def test_report_of_a_finished_update_is_complete(tmp_path: Path) -> None:
    run = Album(tmp_path, count=12, failed={}).write(replaces={10: 0, 11: 1})
    for part in (run / "images").glob("*.parquet"):
        table = pq.read_table(part)
        pq.write_table(table.filter(pc.greater(table["row"], 1)), part)
    text = page_of(run).text
    assert "10 images, 0 failures, 0 pending." in text
    assert "not complete" not in text


def test_report_of_an_update_cut_short_is_not_complete(tmp_path: Path) -> None:
    run = Album(tmp_path, count=12, failed={1: "Truncated", 5: "NotFound"}).write(replaces={10: 0, 11: 1}, parts=5)
    sorted((run / "images").glob("*.parquet"))[-1].unlink()
    assert sorted(pq.read_table(run / "images")["row"].to_pylist()) == [0, 2, 3, 4, 6, 7, 8, 9]
    text = page_of(run).text
    assert "7 images, 1 failures, 2 pending. The run is not complete" in text
    assert "Rows asked for 10 without 2 replaced by newer versions Images 7 70.0% Failures 1 10.0%" in text
    assert "Truncated" not in text
    assert "landscape 7 100%" in text


def test_report_leaves_replaced_rows_out(tmp_path: Path) -> None:
    page = page_of(Album(tmp_path, count=12, failed={}).write(replaces={10: 0, 11: 1}))
    assert sorted(page.rows()) == list(range(2, 12))
    assert "2 replaced by newer versions" in page.text
    assert {point["row"] for point in page.map_data()["points"]} == set(range(2, 12))


def test_report_of_features_that_are_not_finite(tmp_path: Path) -> None:
    album = Album(tmp_path, count=20, failed={})
    album.features[3, 1] = np.nan
    album.features[4] = 0
    page = page_of(album.write())
    assert "2 with zero or non-finite features are left out." in page.text
    assert len(page.map_data()["points"]) == 18


def test_report_without_labels(tmp_path: Path) -> None:
    page = page_of(Album(tmp_path, count=6, failed={}).write(labels=None))
    assert "First label" not in page.text
    assert "0000" in page.text  # the end of an address stands under a picture instead
    assert len(page.rows()) == 6


def test_report_of_a_run_without_images(tmp_path: Path) -> None:
    run = Album(tmp_path, count=3, failed={0: "NotFound", 1: "NotFound"}).write(parts=1)
    shutil.rmtree(run / "images")
    page = page_of(run)
    assert "0 images, 2 failures, 1 pending." in page.text
    assert page.rows() == []
    assert "map" not in page.ids()


def test_report_of_a_run_that_is_not_complete(tmp_path: Path) -> None:
    run = Album(tmp_path, count=20, failed={}).write()
    sorted((run / "images").glob("*.parquet"))[0].unlink()
    assert "10 images, 0 failures, 10 pending. The run is not complete" in page_of(run).text


def test_report_shows_no_signature(tmp_path: Path) -> None:
    signed = [f"https://127.0.0.1:9/p{row}.jpg?X-Amz-Signature=s3cr3t&size=1" for row in range(4)]
    run = Album(tmp_path, count=4, failed={1: "Forbidden"}).write(uris=signed)
    source = Path(write_report(str(run))).read_text(encoding="utf-8")
    assert "s3cr3t" not in source
    assert "127.0.0.1:9/p1.jpg" in source
    assert "cannot be shown" in source


def test_report_on_an_object_store(tmp_path: Path, s3_server: S3Server) -> None:
    run = full_run(Album(tmp_path, count=10, failed={}))
    url = s3_server.upload(run, s3_server.make_bucket(), "a/run")
    options = {"s3": s3_server.storage_options}
    path = write_report(url, storage_options=options)
    assert path == f"{url}/report.html"
    fs, key = filesystem(path, options)
    page = Page(fs.cat_file(key).decode())
    assert sorted(set(page.rows())) == list(range(10))
    assert {"clusters", "duplicates", "map"} <= page.ids()
    with pytest.raises(OutputError, match=r"run\.json"):
        write_report(f"{url}/images", storage_options=options)


@pytest.mark.parametrize("values", [[f"note {row}" for row in range(20)], [900 + row for row in range(20)]])
def test_report_of_a_table_with_a_column_of_a_dotted_name(tmp_path: Path, values: list[str | int]) -> None:
    run = Album(tmp_path, count=20, failed={}).write(user={"row.note": values})
    assert sorted(set(page_of(run).rows())) == list(range(20))
    found = RowLookup(open_run(str(run), {}), "images", ["row", "row.note"]).get([3, 19])
    assert {row: record["row.note"] for row, record in found.items()} == {3: values[3], 19: values[19]}


def test_report_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"not the directory of a run.*run\.json"):
        write_report(str(tmp_path))


def test_report_of_a_damaged_part(tmp_path: Path) -> None:
    run = Album(tmp_path, count=4, failed={}).write()
    sorted((run / "images").glob("*.parquet"))[0].write_bytes(b"PAR1 this is not Parquet PAR1")
    with pytest.raises(OutputError, match="verify"):
        write_report(str(run))
    assert not (run / "report.html").exists()


def test_report_of_many_rows_stays_small(tmp_path: Path) -> None:
    run = big_run(tmp_path, 20_000, 8)
    path = Path(write_report(str(run)))
    assert path.stat().st_size < 2_000_000
    assert "800 of 20 000 pictures by cls" in Page(path.read_text(encoding="utf-8")).text


def test_report_draws_pictures_from_all_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.report.projection._BUDGET_BYTES", 1)
    run = open_run(str(big_run(tmp_path, 20_000, 8, group_rows=500)), {})
    plan = _choose(run, scan_images(run), 200, 0)
    assert plan.map is not None
    assert len({row // 500 for row in plan.map.found.rows.tolist()}) == 8
    assert len({row // 500 for row in plan.gallery}) > 30
    text = page_of(Path(run.root)).text
    assert "800 of 20 000 pictures by cls" in text
    assert "They are from 8 of 40 row groups, drawn at random." in text


def test_report_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    run = Album(tmp_path, count=4, failed={}).write()
    code = (
        "import sys; from pipeline.report import write_report; write_report(sys.argv[1]); "
        "print([name for name in ('torch', 'ray', 'sklearn', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
