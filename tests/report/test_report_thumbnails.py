"""Thumbnails: found again wherever a picture came from, and shown as a person expects."""

import io
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError
from report.album import encoded, tar_of
from support.http_server import HttpServer
from support.odd_images import LONG, POSTSCRIPT, SHORT, tiff_file
from support.runs import RunContent, jpeg, write_run

from pipeline.report import thumbnails
from pipeline.report.run import open_run
from pipeline.report.shrink import shrink
from pipeline.report.thumbnails import Thumbnail, Thumbnailer

RED, BLUE = (210, 20, 20), (20, 20, 210)


def thumbnailer(folder: Path, uris: Sequence[str], **changes: Any) -> Thumbnailer:
    content = RunContent({"cls": np.ones((len(uris), 4), np.float32)}, uris=uris, parts=1, **changes)
    return Thumbnailer(open_run(str(write_run(folder / "run", content)), {}))


def colour_of(thumbnail: Thumbnail) -> tuple[int, int, int]:
    assert thumbnail.data, thumbnail.reason
    pixels = np.asarray(Image.open(io.BytesIO(thumbnail.data)).convert("RGB"))
    red, green, blue = pixels.reshape(-1, 3).mean(axis=0).round().astype(int).tolist()
    return red, green, blue


def is_near(colour: tuple[int, int, int], wanted: tuple[int, int, int]) -> bool:
    return max(abs(a - b) for a, b in zip(colour, wanted, strict=True)) < 14


def test_report_thumbnail_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "#odd name%20?.jpg").write_bytes(jpeg(RED, (640, 320)))
    found = thumbnailer(tmp_path, [str(tmp_path / "#odd name%20?.jpg")]).thumbnails([0], 96)
    assert is_near(colour_of(found[0]), RED)
    assert Image.open(io.BytesIO(found[0].data or b"")).size == (96, 48)


def test_report_thumbnails_of_tar_members(tmp_path: Path) -> None:
    spans = tar_of(tmp_path / "shard.tar", {"a.jpg": jpeg(RED), "b.jpg": jpeg(BLUE), "c.jpg": b"no picture"})
    container = str(tmp_path / "shard.tar")
    source = thumbnailer(
        tmp_path, [f"{container}#{name}.jpg" for name in "abc"], containers=[(container, *span) for span in spans]
    )
    found = source.thumbnails([2, 1, 0], 64)
    assert is_near(colour_of(found[0]), RED)
    assert is_near(colour_of(found[1]), BLUE)
    assert found[2].data is None
    assert "UnidentifiedImageError" in found[2].reason


def test_report_thumbnail_of_a_tar_member_reads_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tar_of(tmp_path / "shard.tar", {"a.jpg": jpeg(RED), "b.jpg": jpeg(BLUE)})
    container = str(tmp_path / "shard.tar")
    uris = [f"{container}#a.jpg", f"{container}#b.jpg"]
    source = thumbnailer(tmp_path, uris, containers=[(container, *first), (container, *second)])
    read: list[bytes] = []
    monkeypatch.setattr(thumbnails, "shrink", lambda data, *rest: read.append(data) or b"made")
    source.thumbnails([0], 64)
    assert read == [jpeg(RED)]


@pytest.mark.parametrize(("column", "nested"), [("image", True), ("photo", False)])
def test_report_thumbnails_of_a_table(tmp_path: Path, column: str, nested: bool) -> None:
    data = [jpeg(RED if row % 2 else BLUE) for row in range(100)]
    data[41] = b"no picture"
    cells = [{"bytes": item, "path": None} for item in data] if nested else data
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"label": list(range(100)), column: cells}), path, row_group_size=30)
    rows = [99, 0, 41, 35, 60]
    source = thumbnailer(
        tmp_path, [f"{path}#{row}" for row in range(100)], containers=[(str(path), row, None) for row in range(100)]
    )
    found = source.thumbnails(rows, 64)
    assert [is_near(colour_of(found[row]), RED if row % 2 else BLUE) for row in (99, 0, 35, 60)] == [True] * 4
    assert found[41].data is None


def test_report_thumbnails_of_a_table_that_is_listed_twice(tmp_path: Path) -> None:
    path = str(tmp_path / "table.parquet")
    pq.write_table(pa.table({"image": [jpeg(RED), jpeg(BLUE)]}), path)
    places = [(path, row % 2, None) for row in range(4)]
    found = thumbnailer(tmp_path, ["a", "b", "a", "b"], containers=places).thumbnails(range(4), 64)
    assert [is_near(colour_of(found[row]), (RED, BLUE)[row % 2]) for row in range(4)] == [True] * 4


def test_report_thumbnails_of_a_table_of_views(tmp_path: Path) -> None:
    path = str(tmp_path / "table.parquet")
    pq.write_table(pa.table({"image": pa.array([jpeg(RED), jpeg(BLUE)], pa.binary_view())}), path)
    found = thumbnailer(tmp_path, ["a", "b"], containers=[(path, 0, None), (path, 1, None)]).thumbnails([0, 1], 64)
    assert is_near(colour_of(found[0]), RED)
    assert is_near(colour_of(found[1]), BLUE)


def test_report_thumbnails_of_a_table_that_says_where_its_pictures_are(
    tmp_path: Path, http_server: Callable[..., HttpServer]
) -> None:
    (tmp_path / "web").mkdir()
    for name, colour in (("red.jpg", RED), ("blue.jpg", BLUE)):
        (tmp_path / "web" / name).write_bytes(jpeg(colour))
    server = http_server(tmp_path / "web")
    cells = [
        {"bytes": None, "path": server.url_of("red.jpg")},
        {"bytes": jpeg(BLUE), "path": server.url_of("red.jpg")},
        {"bytes": None, "path": server.url_of("blue.jpg")},
        {"bytes": None, "path": server.url_of("gone.jpg")},
        {"bytes": None, "path": "red.jpg"},
    ]
    path = str(tmp_path / "table.parquet")
    pq.write_table(pa.table({"image": cells}), path)
    places = [(path, row, None) for row in range(5)]
    found = thumbnailer(tmp_path, list("abcde"), containers=places).thumbnails(range(5), 64, timeout_s=60)
    assert [is_near(colour_of(found[row]), (RED, BLUE, BLUE)[row]) for row in range(3)] == [True] * 3
    assert "FileNotFoundError" in found[3].reason
    assert "empty" in found[4].reason


def test_report_thumbnails_under_odd_names(tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9"  # a byte that is no UTF-8
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(RED))
    (folder / "::.jpg").write_bytes(jpeg(BLUE))
    (span,) = tar_of(folder / "b.tar", {"b.jpg": jpeg(BLUE)})
    with open(folder / "c.parquet", "wb") as file:
        pq.write_table(pa.table({"image": [jpeg(RED)]}), file)
    shown = f"{tmp_path}/caf\\udce9"
    source = thumbnailer(
        tmp_path,
        [f"{shown}/{name}" for name in ("a.jpg", "b.tar#b.jpg", "c.parquet#0", "::.jpg")],
        containers=[
            (None, None, None),
            (f"{shown}/b.tar", *span),
            (f"{shown}/c.parquet", 0, None),
            (None, None, None),
        ],
    )
    found = source.thumbnails(range(4), 64)
    assert [is_near(colour_of(found[row]), (RED, BLUE, RED, BLUE)[row]) for row in range(4)] == [True] * 4


@pytest.mark.parametrize("tables", [1, 6])
def test_report_thumbnails_of_tables_hold_few_pictures_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: int
) -> None:
    places = [(str(tmp_path / f"{row % tables}.parquet"), row // tables, None) for row in range(6)]
    for name in sorted({container for container, _, _ in places}):
        pq.write_table(pa.table({"image": [jpeg(RED)] * 6}), name)
    source = thumbnailer(tmp_path, [f"{row}.jpg" for row in range(6)], containers=places)
    opened: list[str] = []
    whole: list[bytes] = []
    held: list[int] = []
    cells, small = thumbnails._cells, thumbnails.shrink

    def read(part: Any, column: str, offsets: list[int]) -> Any:
        opened.append(column)
        for offset, data in cells(part, column, offsets):
            whole.append(data)
            time.sleep(0.02)
            held.append(max(len(opened), len(whole)))
            yield offset, data
        opened.pop()

    def shrunk(*arguments: Any) -> bytes:
        made = small(*arguments)
        whole.pop()
        return made

    monkeypatch.setattr(thumbnails, "_cells", read)
    monkeypatch.setattr(thumbnails, "shrink", shrunk)
    assert all(made.data for made in source.thumbnails(range(6), 64).values())
    assert max(held) <= 2


def test_report_thumbnails_over_http(tmp_path: Path, http_server: Callable[..., HttpServer]) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "there.jpg").write_bytes(jpeg(BLUE))
    server = http_server(tmp_path / "web")
    addresses = [server.url_of("there.jpg"), f"{server.url_of('gone.jpg')}?X-Amz-Signature=s3cr3t"]
    found = thumbnailer(tmp_path, addresses).thumbnails([0, 1], 64, timeout_s=30)
    assert is_near(colour_of(found[0]), BLUE)
    assert "FileNotFoundError" in found[1].reason
    assert "s3cr3t" not in found[1].reason


def test_report_thumbnail_that_does_not_come_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(RED))
    source = thumbnailer(tmp_path, [str(tmp_path / "a.jpg")])
    asked_no_more = threading.Event()
    monkeypatch.setattr(source, "_from_file", lambda record, side: asked_no_more.wait(30) and b"")
    found = source.thumbnails([0], 64, timeout_s=0.2)
    asked_no_more.set()
    assert found[0].reason == "not read in time"


def test_report_thumbnails_are_read_in_the_order_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not come in time is then what matters least."""
    places: list[tuple[str | None, int | None, int | None]] = [(None, None, None)] * 6
    for row in (1, 4):
        pq.write_table(pa.table({"image": [f"{row}".encode()]}), tmp_path / f"{row}.parquet")
        places[row] = (str(tmp_path / f"{row}.parquet"), 0, None)
    for row in (0, 2, 3, 5):
        (tmp_path / f"{row}.jpg").write_bytes(f"{row}".encode())
    monkeypatch.setattr(thumbnails, "_READERS", 1)
    monkeypatch.setattr(thumbnails, "_TABLE_READERS", 1)
    source = thumbnailer(tmp_path, [str(tmp_path / f"{row}.jpg") for row in range(6)], containers=places)
    read: list[int] = []
    monkeypatch.setattr(thumbnails, "shrink", lambda data, *rest: read.append(int(data)) or b"made")
    assert set(source.thumbnails([5, 4, 2, 7, 3, 1, 0], 64)) == {0, 1, 2, 3, 4, 5, 7}
    assert [row for row in read if row not in (1, 4)] == [5, 2, 3, 0]
    assert [row for row in read if row in (1, 4)] == [4, 1]


def test_report_thumbnail_of_a_row_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(RED))
    found = thumbnailer(tmp_path, [str(tmp_path / "a.jpg")]).thumbnails([0, 7], 64)
    assert found[0].data
    assert "no such row" in found[7].reason


def test_report_thumbnail_of_too_many_pixels() -> None:
    with pytest.raises(Exception, match="100×50 pixels exceed the limit of 4999"):
        shrink(encoded(Image.new("RGB", (100, 50)), "PNG"), 64, 4999)


def test_report_thumbnail_of_no_bytes() -> None:
    with pytest.raises(Exception, match="empty"):
        shrink(b"", 64, 10_000)


def test_report_thumbnail_of_what_the_job_does_not_decode() -> None:
    """For PostScript Pillow would start Ghostscript."""
    with pytest.raises(UnidentifiedImageError):
        shrink(POSTSCRIPT, 64, 1_000_000)


@pytest.mark.parametrize(
    ("tags", "body", "wanted"),
    [
        ([(258, SHORT, 1, 12), (277, SHORT, 1, 1)], b"\xff" * 24, (255, 255, 255)),
        ([(258, SHORT, 2, 8 | 8 << 16), (277, SHORT, 1, 2), (338, SHORT, 1, 1)], b"\x40\x80" * 16, (191, 191, 191)),
    ],
    ids=["twelve-bit", "premultiplied"],
)
def test_report_thumbnail_has_the_colours_of_the_job(
    tags: list[tuple[int, int, int, int]], body: bytes, wanted: tuple[int, int, int]
) -> None:
    common = [(256, LONG, 1, 4), (257, LONG, 1, 4), (259, SHORT, 1, 1), (262, SHORT, 1, 1), (279, LONG, 1, len(body))]
    head = tiff_file(*common, *tags, (273, LONG, 1, 0))
    picture = tiff_file(*common, *tags, (273, LONG, 1, len(head))) + body
    assert is_near(colour_of(Thumbnail(shrink(picture, 64, 100))), wanted)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_report_thumbnail_applies_the_orientation(orientation: int) -> None:
    upright = Image.new("RGB", (80, 40), "white")
    upright.paste("red", (0, 0, 20, 20))  # top left
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    small = Image.open(io.BytesIO(shrink(encoded(stored, "JPEG", exif=exif, quality=95), 64, 10_000))).convert("RGB")
    assert small.size == (64, 32)
    red, green, _ = small.getpixel((5, 5))
    assert red > 200
    assert green < 80


@pytest.mark.parametrize(
    ("image", "kind", "wanted"),
    [
        (Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "JPEG", (250, 5, 5)),
        (Image.new("RGBA", (40, 40), (0, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("LA", (40, 40), (0, 128)), "PNG", (127, 127, 127)),
        (Image.new("P", (40, 40), 0), "GIF", (0, 0, 0)),
        (Image.new("1", (40, 40), 1), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((40, 40), 32_768, np.uint16)), "PNG", (128, 128, 128)),
        (Image.fromarray(np.full((40, 40), 0.5, np.float32)), "TIFF", (128, 128, 128)),
    ],
    ids=["cmyk", "transparent", "gray-alpha", "palette", "bilevel", "sixteen-bit", "float"],
)
def test_report_thumbnail_modes(image: Image.Image, kind: str, wanted: tuple[int, int, int]) -> None:
    found = Thumbnail(shrink(encoded(image, kind), 32, 10_000))
    assert is_near(colour_of(found), wanted)
