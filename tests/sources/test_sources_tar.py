"""WebDataset shards: which members are images, where their bytes lie, what rides along, what is broken."""

import io
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.faults import Rule
from support.http_server import HttpServer
from support.s3 import S3Server

from pipeline.sources.columns import concatenated
from pipeline.sources.expand import in_order
from pipeline.sources.manifest import read_sources, write_manifest
from pipeline.sources.tar import list_tar
from schemas.errors import SourceError
from schemas.spec import build_spec

Members = Iterable[tuple[str, bytes]]
LONG = "/".join(["folder-with-a-long-name-" + "x" * 30] * 6) + "/photo.jpg"


def write_tar(path: Path, members: Members, **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as shard:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return path


def read(*sources: str | Path, **values: Any) -> pa.Table:
    """All rows as one table."""
    spec = build_spec({"sources": [str(source) for source in sources], "model": "m", "out": "/nowhere", **values})
    return concatenated(list(read_sources(spec)))


def contents(path: Path, table: pa.Table) -> dict[str, bytes]:
    """What lies at each row's range, by the name of the member."""
    data = path.read_bytes()
    rows = table.filter([container == str(path) for container in table["container"].to_pylist()])
    return {
        row["uri"].removeprefix(f"{path}#"): data[row["offset"] : row["offset"] + row["length"]]
        for row in rows.to_pylist()
    }


SAMPLES = [(f"{number:04d}.jpg", bytes([number]) * (number * 37 + 1)) for number in range(20)]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_image_lies_where_its_row_says(tmp_path: Path, form: int) -> None:
    members = [*SAMPLES, ("sub/äöü.PNG", b"umlaut")]
    members += [(LONG, b"long name")] if form != tarfile.USTAR_FORMAT else []
    path = write_tar(tmp_path / "x.tar", members, format=form)
    table = read(path)
    assert contents(path, table) == dict(members)
    assert table["size"].to_pylist() == [len(data) for _, data in members]
    assert table["uri"][0].as_py() == f"{path}#0000.jpg"


def test_large_numbers_of_pax_and_other_members(tmp_path: Path) -> None:
    """Folders, links, hidden files and what is no image are no rows."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as shard:
        for name, kind in (("dir", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mtime = kind, "a.jpg", 1.5
            shard.addfile(member)
        for name in ("a.jpg", "._a.jpg", "a.npy", "README", "b.seg.png", ".DS_Store"):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = 3, {"comment": "x" * 2000}
            shard.addfile(member, io.BytesIO(name[:3].ljust(3).encode()))
    assert contents(path, read(path)) == {"a.jpg": b"a.j", "README": b"REA", "b.seg.png": b"b.s"}


def test_sidecars_ride_along_wherever_they_stand_in_the_sample(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("1.jpg", b"a"), ("1.cls", b" 7 \n"), ("1.json", b'{"a": 1}'),
            ("2.txt", "Katze é".encode()), ("2.jpg", b"b"),
            ("d/3.left.jpg", b"c"), ("d/3.cls", b"9"), ("d/3.right.png", b"d"),
            ("4.jpg", b"e"),
            ("d/4.json", b"{}"),
            ("5.cls", b"5"), ("5.json", b"x" * (1 << 21)), ("5.jpg", b"f"), ("5.txt", b"\xff"),
        ],
    )  # fmt: skip
    table = read(path)
    names = ["1.jpg", "2.jpg", "d/3.left.jpg", "d/3.right.png", "4.jpg", "5.jpg"]
    assert table["uri"].to_pylist() == [f"{path}#{name}" for name in names]
    assert table.select(["json", "user_cls", "txt"]).to_pylist() == [
        {"json": '{"a": 1}', "user_cls": "7", "txt": None},
        {"json": None, "user_cls": None, "txt": "Katze é"},
        {"json": None, "user_cls": "9", "txt": None},
        {"json": None, "user_cls": "9", "txt": None},
        {"json": None, "user_cls": None, "txt": None},
        {"json": None, "user_cls": "5", "txt": "\ufffd"},
    ]


def test_names_twice_and_names_that_are_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as shard:
        for name, data in (("a.jpg", b"1"), ("a.jpg", b"22"), ("caf\xe9.jpg", b"333")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    table = read(path)
    assert table["uri"].to_pylist() == [f"{path}#a.jpg", f"{path}#a.jpg", f"{path}#caf\\udce9.jpg"]
    assert table["length"].to_pylist() == [1, 2, 3]


# --- broken shards: what is good becomes rows, and the shard one more


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (512 * 3 + 200, ["#a.jpg", "#b.jpg", ""]),  # in the data of the second member
        (512 * 4 + 10, ["#a.jpg", "#b.jpg", ""]),  # in the third header
        (512 * 5, ["#a.jpg", "#b.jpg", "#c.jpg", ""]),  # behind it
        (512 * 4, ["#a.jpg", "#b.jpg"]),  # between two members: nobody can tell that there was more
    ],
)
def test_a_truncated_shard(tmp_path: Path, cut: int, expected: list[str], caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1" * 400), ("b.jpg", b"2" * 400), ("c.jpg", b"3" * 400)])
    path.write_bytes(path.read_bytes()[:cut])
    table = read(path)
    assert table["uri"].to_pylist() == [f"{path}{name}" for name in expected]
    assert contents(path, table)["a.jpg"] == b"1" * 400
    assert str(path) in caplog.text


def test_a_damaged_header_does_not_end_the_shard_in_silence(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", SAMPLES)
    data = bytearray(path.read_bytes())
    offset = read(path)["offset"][10].as_py() - 512
    data[offset + 150] ^= 0xFF
    path.write_bytes(data)
    uris = read(path)["uri"].to_pylist()
    assert uris == [*(f"{path}#{name}" for name, _ in SAMPLES[:10]), str(path)]
    with pytest.raises(tarfile.ReadError, match=f"no valid header at byte {offset:,}"):
        list(list_tar(str(path), {}))


@pytest.mark.parametrize("data", [b"", b"no tar at all " * 100, b"\x1f\x8b\x08\x00" + bytes(600)])
def test_a_file_that_is_no_tar_is_one_row(tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    assert read(tmp_path / "x.tar")["uri"].to_pylist() == [f"{tmp_path}/x.tar"]
    assert "x.tar" in caplog.text


def test_every_format_that_is_decoded_is_an_image_in_a_shard(tmp_path: Path) -> None:
    from PIL import Image

    from pipeline.images.formats import prepare_process
    from pipeline.picture_formats import FORMATS

    prepare_process()
    known = sorted(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
    assert len(known) > 40
    write_tar(tmp_path / "x.tar", [(f"a{number}{suffix}", b"1") for number, suffix in enumerate(known)])
    assert [uri.rpartition(".")[2] for uri in read(tmp_path / "x.tar")["uri"].to_pylist()] == [s[1:] for s in known]


def test_an_empty_shard_has_no_rows(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [])
    with pytest.raises(SourceError, match="no image matches"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "*.tar.gz", "x-????.tar.gz", "X.TAR.ZST"])
def test_compressed_tars_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match=r"compressed tar, whose members cannot be read by range; unpack"):
        read(tmp_path / name)
    with pytest.raises(SourceError, match="compressed tar"):
        read(f"https://h.example/{re.sub('[*?]', 'x', name)}?sig=1")


# --- many shards


def test_shards_and_images_keep_the_order_of_the_listing(tmp_path: Path) -> None:
    expected = []
    for number in range(30):
        shard = write_tar(
            tmp_path / f"{number:02d}-a.tar", [(f"{number}.jpg", b"x"), (f"{number}.cls", b"%d" % number)]
        )
        (tmp_path / f"{number:02d}-b.jpg").write_bytes(b"x")
        expected += [f"{shard}#{number}.jpg", f"{tmp_path}/{number:02d}-b.jpg"]
    table = read(tmp_path)
    assert table["uri"].to_pylist() == expected
    assert table["user_cls"].to_pylist()[::2] == [str(number) for number in range(30)]
    assert read(tmp_path, limit=5)["uri"].to_pylist() == expected[:5]
    assert read(f"{tmp_path}/0[0-4]-a.tar")["uri"].to_pylist() == expected[:10:2]


def test_include_and_exclude_reach_into_shards(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_tar(tmp_path / f"{name}.tar", [("a.jpg", b"x"), ("b.png", b"x")])

    def names(**values: Any) -> list[str]:
        return [uri.removeprefix(f"{tmp_path}/") for uri in read(tmp_path, **values)["uri"].to_pylist()]

    assert names(include=["*.jpg"]) == ["one.tar#a.jpg", "two.tar#a.jpg"]
    assert names(include=["one.tar"], exclude=["*.png"]) == ["one.tar#a.jpg"]
    assert names(exclude=["one.tar"]) == ["two.tar#a.jpg", "two.tar#b.png"]


def test_sidecars_may_differ_from_shard_to_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.cls", b"1")])
    write_tar(tmp_path / "b.tar", [("2.jpg", b"x"), ("2.txt", b"two")])
    table = read(tmp_path)
    assert table.select(["user_cls", "txt"]).to_pylist() == [
        {"user_cls": "1", "txt": None},
        {"user_cls": None, "txt": "two"},
    ]
    assert len(write_manifest([table], str(tmp_path / "out"), {})) == 1


def test_who_stops_listing_waits_for_no_shard() -> None:
    begun, never, table = threading.Event(), threading.Event(), pa.table({"uri": ["/a.jpg"]})

    def endless() -> list[pa.Table]:
        begun.set()
        never.wait(30)
        return []

    listed = in_order([lambda: [table], *[endless] * 20], ahead=1)
    assert next(listed) is table
    assert begun.wait(30)
    started = time.monotonic()
    listed.close()
    assert time.monotonic() - started < 5
    never.set()


def test_nothing_runs_on_once_all_is_listed() -> None:
    table = pa.table({"uri": ["/a.jpg"]})
    assert list(in_order([table, *[lambda: [table]] * 20, table], ahead=8)) == [table] * 22
    while any(thread.name.startswith("patchstream-list") for thread in threading.enumerate()):
        time.sleep(0.01)  # to the time limit of the test


# --- remote shards


def test_a_remote_shard_is_listed_by_few_requests(tmp_path: Path, s3_server: S3Server, flaky_proxy: Any) -> None:
    small = [(f"{number:05d}.jpg", bytes([number % 256]) * 10_000) for number in range(800)]  # 8 MB
    large = [(f"{number}.jpg", bytes([number]) * 2_500_000) for number in range(4)]  # 10 MB
    write_tar(tmp_path / "small.tar", small)
    write_tar(tmp_path / "large.tar", large)
    base = s3_server.upload(tmp_path, s3_server.make_bucket())
    proxy = flaky_proxy(s3_server)
    for name, members, most_requests, most_bytes in (
        ("small.tar", small, 10, 16 << 20),
        ("large.tar", large, 7, 2 << 20),
    ):
        proxy.control.forget()
        table = read(f"{base}/{name}", storage_options=proxy.server.storage_options)
        assert table["uri"].to_pylist() == [f"{base}/{name}#{member}" for member, _ in members]
        data = (tmp_path / name).read_bytes()
        ranges = zip(table["offset"].to_pylist(), table["length"].to_pylist(), strict=True)
        assert [data[start : start + length] for start, length in ranges] == [content for _, content in members]
        log = [entry[2] for entry in proxy.control.stats()["log"] if entry[2] is not None]
        spans = [[int(end) for end in text.removeprefix("bytes=").split("-")] for text in log]
        assert len(spans) <= most_requests
        assert sum(stop - start + 1 for start, stop in spans) < most_bytes


@pytest.mark.parametrize("fault", ["status", "reset", "truncate", "ignore_range", "no_length"])
def test_faults_on_the_way_cost_no_members(tmp_path: Path, http_server: Callable[..., HttpServer], fault: Any) -> None:
    members = [*SAMPLES, ("big.jpg", bytes(600_000)), ("last.jpg", b"x"), ("last.cls", b"3")]
    write_tar(tmp_path / "x.tar", members)
    first = None if fault in {"ignore_range", "no_length"} else 2
    server = http_server(tmp_path, [Rule(fault, methods=("GET",), first=first, after_bytes=5000)])
    table = read(f"{server.url}/x.tar")
    assert [uri.partition("#")[2] for uri in table["uri"].to_pylist()] == [name for name, _ in members[:-1]]
    assert table["user_cls"][-1].as_py() == "3"
    assert server.control.faults() > 0
    if fault == "ignore_range":
        assert server.control.faults() == 1  # and not once for each block


def test_a_shard_that_cannot_be_reached_is_an_error_and_not_a_row(
    tmp_path: Path, http_server: Callable[..., HttpServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sources.reading._BASE_S", 0.001)
    write_tar(tmp_path / "x.tar", [*SAMPLES, ("big.jpg", bytes(3_000_000)), ("z.jpg", b"z")])
    server = http_server(tmp_path, [Rule("reset", methods=("GET",), after_bytes=1000)])
    with pytest.raises(SourceError, match=r"x\.tar: cannot be read"):
        read(f"{server.url}/x.tar")
    with pytest.raises(SourceError, match=r"none\.tar: no such file"):
        read(f"{server.url}/none.tar")
