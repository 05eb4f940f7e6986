"""What a source string stands for on a disk and elsewhere; globs everywhere; what is left out."""

import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.gcs import GcsServer
from support.http_server import HttpServer
from support.s3 import S3Server
from support.shards import make_named_tar
from support.source_rows import NAMES, listed, read, rows_of, spec_of, tree
from support.unprivileged import folder_for_all, without_root

from pipeline.sources.listing import list_source, wanted
from pipeline.sources.manifest import read_sources
from schemas.errors import SourceError, SpecError

Server = S3Server | GcsServer


# --- a disk


def test_a_folder_holds_every_file_below_it(tmp_path: Path) -> None:
    tree(tmp_path)
    assert sorted(listed(tmp_path, below=tmp_path)) == sorted(NAMES)
    assert listed(f"{tmp_path}/cats/", below=tmp_path) == ["cats/c.jpg", "cats/deep/d.jpg"]
    assert listed(f"file://{tmp_path}/cats", below=tmp_path) == ["cats/c.jpg", "cats/deep/d.jpg"]


def test_a_file_has_a_size_and_an_etag_that_changes_with_it(tmp_path: Path) -> None:
    tree(tmp_path)
    (before,) = list_source(f"{tmp_path}/a.jpg", {})
    assert before.size == 5
    (tmp_path / "a.jpg").write_bytes(b"other")
    os.utime(tmp_path / "a.jpg", ns=(1, 1))
    (after,) = list_source(f"{tmp_path}/a.jpg", {})
    assert before.uri == after.uri
    assert before.etag != after.etag


def test_relative_sources_give_absolute_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    for source in ("photos/cats", "./photos/cats", "photos/../photos/cats/", "photos/cats/**"):
        assert listed(source) == [f"{tmp_path}/photos/cats/c.jpg", f"{tmp_path}/photos/cats/deep/d.jpg"]
    assert listed("photos/a.jpg") == [f"{tmp_path}/photos/a.jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", {".hidden.jpg", "a.jpg", "caté ü#?%41.jpg"}),
        ("?.jpg", {"a.jpg"}),
        ("[ab].*", {"a.jpg", "b.png"}),
        ("[!a].*", {"b.png"}),
        ("*/*.jpg", {"cats/c.jpg", "dogs/e[1].jpg"}),
        ("**/*.jpg", {name for name in NAMES if name.endswith(".jpg")}),
        ("cats/**", {"cats/c.jpg", "cats/deep/d.jpg"}),
        ("**/deep/*", {"cats/deep/d.jpg"}),
        ("c*", {"cats/c.jpg", "cats/deep/d.jpg", "caté ü#?%41.jpg"}),
        ("dogs/e[[]1].jpg", {"dogs/e[1].jpg"}),
        ("dogs/e[1].jpg", {"dogs/e[1].jpg"}),
    ],
)
@pytest.mark.parametrize("place", ["disk", "s3", "gs", "memory"])
def test_globs(tmp_path: Path, pattern: str, expected: set[str], place: str, request: pytest.FixtureRequest) -> None:
    tree(tmp_path)
    options: dict[str, Any] = {}
    base = str(tmp_path)
    if place == "memory":
        fs, base = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"
        for name in NAMES:
            fs.pipe_file(f"/{tmp_path.name}/{name}", b"x")
    elif place != "disk":
        base, options = bucket_of_names(request, place)
    found = (uri.replace("memory:///", "memory://") for uri in listed(f"{base}/{pattern}", options))
    assert {uri.removeprefix(f"{base}/") for uri in found} == expected


_BUCKETS: dict[str, tuple[str, dict[str, Any]]] = {}


def bucket_of_names(request: pytest.FixtureRequest, place: str) -> tuple[str, dict[str, Any]]:
    """A bucket of the session's server with NAMES in it, made once."""
    if place not in _BUCKETS:
        server: Server = request.getfixturevalue("s3_server" if place == "s3" else "gcs_server")
        bucket = server.make_bucket()
        for name in NAMES:
            server.put(bucket, name, name.encode())
        _BUCKETS[place] = f"{place}://{bucket}", server.storage_options
    return _BUCKETS[place]


def test_a_local_glob_does_not_walk_what_it_cannot_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path)
    seen: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(str(path)) or scandir(path))
    assert listed(f"{tmp_path}/dogs*/*.jpg", below=tmp_path) == ["dogs/e[1].jpg"]
    assert seen == [str(tmp_path), f"{tmp_path}/dogs"]


def test_links_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    tree(tmp_path / "real", ["x.jpg", "sub/y.jpg"])
    source = tmp_path / "source"
    source.mkdir()
    (source / "one").symlink_to(tmp_path / "real")
    (source / "two").symlink_to(tmp_path / "real")
    (source / "photo.jpg").symlink_to(tmp_path / "real/x.jpg")
    (source / "gone.jpg").symlink_to(tmp_path / "nothing")
    (source / "loop.jpg").symlink_to("loop.jpg")
    (source / "through.jpg").symlink_to(tmp_path / "real/x.jpg/z.jpg")
    (tmp_path / "real/sub/up").symlink_to(source)
    assert listed(source, below=source) == [
        *("gone.jpg", "loop.jpg", "photo.jpg", "through.jpg"),
        *("one/x.jpg", "one/sub/y.jpg", "two/x.jpg", "two/sub/y.jpg"),
    ]
    assert [entry.size for entry in list_source(f"{source}/gone.jpg", {})] == [None]


def test_a_name_that_is_no_utf_8_is_one_row(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/odd"
    os.mkdir(folder)
    for name in (b"caf\xe9.jpg", b"good.jpg"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(b"x")
    assert rows_of(spec_of(tmp_path / "odd")) == [f"{tmp_path}/odd/caf\\udce9.jpg", f"{tmp_path}/odd/good.jpg"]


def test_shards_and_tables_in_a_folder_whose_name_is_no_utf_8(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(folder)
    make_named_tar(Path(folder, "a.tar"), {"1.jpg": b"x"})
    for name, column in (("b", {"image": [b"x"]}), ("c", {"uri": ["2.jpg"]})):
        with open(f"{folder}/{name}.parquet", "wb") as file:
            pq.write_table(pa.table(column), file)
    shown = f"{tmp_path}/caf\\udce9"
    expected = [f"{shown}/a.tar#1.jpg", f"{shown}/b.parquet#0", f"{shown}/2.jpg"]
    assert rows_of(spec_of(tmp_path)) == rows_of(spec_of(f"{tmp_path}/caf?")) == expected
    assert read(tmp_path)["container"].to_pylist() == [f"{shown}/a.tar", f"{shown}/b.parquet", None]
    with pytest.raises(SourceError, match=r"caf\\udce9 holds bytes that are no UTF-8.*name the folder above it"):
        read(folder)


def test_a_folder_that_cannot_be_read_is_an_error() -> None:
    with folder_for_all() as folder:
        tree(folder)
        (folder / "cats").chmod(0)
        with without_root(), pytest.raises(SourceError, match=f"{folder}.*denied"):
            listed(folder)
        (folder / "cats").chmod(0o755)


@pytest.mark.parametrize("name", ["nothing", "nothing/", "nothing/*.jpg", "a.jpg/x"])
def test_what_is_not_there_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    tree(tmp_path)
    with pytest.raises(SourceError, match=f"{tmp_path}/.*: no such file, folder or prefix"):
        listed(f"{tmp_path}/{name}")


def test_an_unknown_scheme_is_an_error() -> None:
    with pytest.raises(SourceError, match="no file system for this address"):
        listed("floppy://a/b")


def test_chained_addresses_keep_their_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("in/a.jpg", b"A")
        archive.writestr("in/b.png", b"B")
    chain = f"file://{tmp_path}/x.zip"
    assert listed(f"zip://in/*.jpg::{chain}") == [f"zip://in/a.jpg::{chain}"]
    assert listed(f"zip://in::{chain}") == [f"zip://in/a.jpg::{chain}", f"zip://in/b.png::{chain}"]
    with fsspec.open(f"zip://in/b.png::{chain}") as file:
        assert file.read() == b"B"
    monkeypatch.chdir(tmp_path)  # where the workers are not
    assert listed("zip://in/*.jpg::x.zip") == [f"zip://in/a.jpg::{tmp_path}/x.zip"]


class _Hosted(MemoryFileSystem):
    """As ftp and sftp: the host is in the address, and no path knows it."""

    protocol = "hosted"
    store: ClassVar[dict[str, Any]] = {}

    def __init__(self, host: str, **options: Any) -> None:
        super().__init__(**options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(urlsplit(path).path))

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        return {"host": urlsplit(path).netloc} if urlsplit(path).netloc else {}


@pytest.mark.parametrize("host", ["hosted://h:21", "hosted://me:hidden@h"])
def test_addresses_keep_the_host_that_no_path_knows(host: str) -> None:
    fsspec.register_implementation("hosted", _Hosted, clobber=True)
    fs, _ = fsspec.core.url_to_fs(f"{host}/")
    fs.pipe({"/pics/a.jpg": b"A", "/pics/sub/b.jpg": b"B", "/out/run.json": b"{}", "/c.csv": b"uri\npics/a.jpg\n"})
    both = [f"{host}/pics/a.jpg", f"{host}/pics/sub/b.jpg"]
    assert listed(f"{host}/pics") == listed(f"{host}/pics/") == listed(f"{host}/pics/**/*.jpg") == both
    assert listed(both[1]) == listed(f"{host}/*/sub") == both[1:]
    assert rows_of(spec_of(f"{host}/", f"{host}/c.csv", out=f"{host}/out")) == [f"{host}/c.csv", *both, both[0]]
    with fsspec.open(both[1]) as file:
        assert file.read() == b"B"


# --- memory


class _Pages:
    """A store of 200,000 keys that answers page by page, and looks each time how much this process holds."""

    KEYS = 200_000

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.arrow_bytes: list[int] = []

    def call_s3(self, method: str, *, Prefix: str, ContinuationToken: str = "0", **kwargs: Any) -> dict[str, Any]:
        self.blocks.append(sys.getallocatedblocks())
        self.arrow_bytes.append(pa.total_allocated_bytes())
        first, stop = int(ContinuationToken), min(int(ContinuationToken) + 1000, self.KEYS)
        items = [{"Key": f"{Prefix}{key:060d}.jpg", "Size": key, "ETag": f'"{key:x}"'} for key in range(first, stop)]
        return {"Contents": items, "IsTruncated": stop < self.KEYS, "NextContinuationToken": str(stop)}


def test_listing_many_keys_holds_some_pages_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = _Pages()
    monkeypatch.setattr(
        "pipeline.sources.listing.open_filesystem", lambda url, options: (pages, url.removeprefix("s3://"))
    )
    rows = sum(table.num_rows for table in read_sources(spec_of("s3://bucket/many/")))
    assert (rows, len(pages.blocks)) == (200_000, 200)
    early, late = max(pages.blocks[:40]) - pages.blocks[0], max(pages.blocks[40:]) - pages.blocks[0]
    assert late < 1.2 * early < 300_000
    assert max(pages.arrow_bytes) - pages.arrow_bytes[0] < 16 << 20


# --- include, exclude, limit, the output below the source


def test_include_and_exclude_look_at_the_address_and_at_its_last_segment() -> None:
    assert wanted("s3://b/cats/1.jpg", ("*.jpg",), ())
    assert wanted("s3://b/cats/1.jpg", ("s3://b/cats/*",), ())
    assert not wanted("s3://b/cats/1.jpg", ("*.png", "dogs/*"), ())
    assert not wanted("s3://b/cats/1.jpg", ("*.jpg",), ("*/cats/*",))
    assert not wanted("s3://b/cats/.DS_Store", (), (".*",))
    assert wanted("/x/run::1/IMG_1.jpg", ("IMG*",), ())
    assert not wanted("/x/run::1/.DS_Store", (), (".*",))
    assert wanted("/x/.old::2/a.jpg", (), (".*",))


def test_the_name_is_seen_in_front_of_an_archive_and_of_a_query(
    tmp_path: Path, http_server: Callable[..., HttpServer]
) -> None:
    make_named_tar(tmp_path / "s.tar", {"1.jpg": b"x", "in/2.jpg": b"y"})
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "s.tar", "s.tar")
        archive.writestr("in/a.jpg", b"A")
    chain, web = f"::file://{tmp_path}/x.zip", http_server(tmp_path).url
    (tmp_path / "t.csv").write_text(
        f"uri\n{web}/a.gif?sig=x/y\n{web}/b.png?n=a.gif\n{web}/a.gif?n=b#c\nhttp://[h/c.bmp\n"
    )
    shard, signed, table = f"zip://s.tar{chain}", f"{web}/s.tar?sig=x/y", f"{tmp_path}/t.csv"
    for include, expected in (
        (("a.jpg",), [f"zip://in/a.jpg{chain}"]),
        (("2.*",), [f"{shard}#in/2.jpg", f"{signed}#in/2.jpg"]),
        (("s.tar#1.*",), [f"{shard}#1.jpg", f"{signed}#1.jpg"]),
        (("s.*",), [f"{shard}#1.jpg", f"{shard}#in/2.jpg", f"{signed}#1.jpg", f"{signed}#in/2.jpg"]),
        (("*.gif",), [f"{web}/a.gif?sig=x/y", f"{web}/b.png?n=a.gif", f"{web}/a.gif?n=b#c"]),
        (("c.bmp",), ["http://[h/c.bmp"]),
        (("a.gif",), [f"{web}/a.gif?sig=x/y", f"{web}/a.gif?n=b#c"]),
    ):
        found = rows_of(spec_of(f"zip://{chain}", signed, table, include=include))
        assert sorted(found) == sorted(expected), include
    assert rows_of(spec_of(table, exclude=["a.*", "c.*"])) == [f"{web}/b.png?n=a.gif"]
    assert rows_of(spec_of(f"zip://{chain}", exclude=["s.tar", "x.*"])) == [f"zip://in/a.jpg{chain}"]


def test_include_exclude_and_limit(tmp_path: Path) -> None:
    tree(tmp_path)
    assert len(rows_of(spec_of(tmp_path, include=["*.jpg"], exclude=[".*"]))) == 5
    assert rows_of(spec_of(tmp_path, include=["*/cats/*"], limit=1)) == [f"{tmp_path}/cats/c.jpg"]
    assert len(rows_of(spec_of(tmp_path, f"{tmp_path}/cats", limit=8))) == 8
    with pytest.raises(SourceError, match=r"no image matches .* with the given --include/--exclude"):
        rows_of(spec_of(tmp_path, include=["*.tiff"]))


def test_an_empty_folder_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"no image matches {tmp_path}; give a file"):
        rows_of(spec_of(tmp_path))


@pytest.mark.parametrize("out", ["{}/out", "out", "./out/", "file://{}/out"])
def test_an_output_below_the_source_is_no_input(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, ["a.jpg", "out/images/part.parquet", "out/run.json", "outer/b.jpg"])
    monkeypatch.chdir(tmp_path)
    assert rows_of(spec_of(".", out=out.format(tmp_path))) == [f"{tmp_path}/a.jpg", f"{tmp_path}/outer/b.jpg"]


@pytest.mark.parametrize("source", ["in", "in/deep", "./in/*.jpg", "in/"])
def test_a_source_that_is_the_output_or_below_it_is_refused(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even beside others: it would give no row."""
    tree(tmp_path, ["in/a.jpg", "in/deep/b.jpg", "input/c.jpg"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=rf"{re.escape(source)} lies in --out in, .*choose an --out below the source"):
        rows_of(spec_of("input", source, out="in"))
    assert rows_of(spec_of("input", out="in")) == [f"{tmp_path}/input/c.jpg"]


def test_an_output_below_the_prefix_is_no_input(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket()
    for name in ("in/a.jpg", "in/out/run.json"):
        s3_server.put(bucket, name, b"x")
    spec = spec_of(f"s3://{bucket}/in", out=f"s3a://{bucket}/in/out", storage_options=s3_server.storage_options)
    assert rows_of(spec) == [f"s3://{bucket}/in/a.jpg"]


def test_several_sources_follow_one_another(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "list.csv").write_text("uri\ncats/c.jpg\n")
    uris = rows_of(spec_of(tmp_path / "b.png", tmp_path / "list.csv", tmp_path / "dogs"))
    assert uris == [f"{tmp_path}/b.png", f"{tmp_path}/cats/c.jpg", f"{tmp_path}/dogs/e[1].jpg"]
