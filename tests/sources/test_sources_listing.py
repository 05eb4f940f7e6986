"""What a source string stands for on a disk, on S3, on Google Cloud Storage, on a web server and elsewhere."""

import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from support.faults import Rule
from support.gcs import GcsServer
from support.http_server import HttpServer
from support.s3 import S3Server

from pipeline.sources.listing import list_source, wanted
from pipeline.sources.manifest import read_sources
from schemas.errors import SourceError
from schemas.spec import JobSpec, build_spec

Server = S3Server | GcsServer
NAMES = ["a.jpg", "b.png", ".hidden.jpg", "cats/c.jpg", "cats/deep/d.jpg", "dogs/e[1].jpg", "caté ü#?%41.jpg"]


def tree(folder: Path, names: list[str] = NAMES) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def listed(source: str | Path, options: dict[str, Any] | None = None, below: str | Path = "") -> list[str]:
    """Addresses, those below `below` cut short."""
    cut = f"{below}/" if below else ""
    return [entry.uri.removeprefix(cut) for entry in list_source(str(source), options or {})]


def spec_of(*sources: str | Path, out: str = "/nowhere/out", **values: Any) -> JobSpec:
    return build_spec({"sources": [str(source) for source in sources], "model": "m", "out": out, **values})


def rows_of(spec: JobSpec) -> list[str]:
    return [uri for table in read_sources(spec) for uri in table["uri"].to_pylist()]


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
    (tmp_path / "real/sub/up").symlink_to(source)
    assert listed(source, below=source) == [
        *("gone.jpg", "photo.jpg", "one/x.jpg", "one/sub/y.jpg", "two/x.jpg", "two/sub/y.jpg")
    ]
    assert [entry.size for entry in list_source(f"{source}/gone.jpg", {})] == [None]


def test_a_name_that_is_no_utf_8_is_one_row(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/odd"
    os.mkdir(folder)
    for name in (b"caf\xe9.jpg", b"good.jpg"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(b"x")
    assert rows_of(spec_of(tmp_path / "odd")) == [f"{tmp_path}/odd/caf\\udce9.jpg", f"{tmp_path}/odd/good.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "cats").chmod(0)
    try:
        with pytest.raises(SourceError, match="denied"):
            listed(tmp_path)
    finally:
        (tmp_path / "cats").chmod(0o755)


@pytest.mark.parametrize("name", ["nothing", "nothing/", "nothing/*.jpg", "a.jpg/x"])
def test_what_is_not_there_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    tree(tmp_path)
    with pytest.raises(SourceError, match=f"{tmp_path}/.*: no such file, folder or prefix"):
        listed(f"{tmp_path}/{name}")


def test_an_unknown_scheme_is_an_error() -> None:
    with pytest.raises(SourceError, match="no file system for this address"):
        listed("floppy://a/b")


def test_chained_addresses_keep_their_chain(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("in/a.jpg", b"A")
        archive.writestr("in/b.png", b"B")
    chain = f"file://{tmp_path}/x.zip"
    assert listed(f"zip://in/*.jpg::{chain}") == [f"zip://in/a.jpg::{chain}"]
    assert listed(f"zip://in::{chain}") == [f"zip://in/a.jpg::{chain}", f"zip://in/b.png::{chain}"]
    with fsspec.open(f"zip://in/b.png::{chain}") as file:
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
    monkeypatch.setattr("pipeline.sources.listing.filesystem", lambda url, options: (pages, url.removeprefix("s3://")))
    rows = sum(table.num_rows for table in read_sources(spec_of("s3://bucket/many/")))
    assert (rows, len(pages.blocks)) == (200_000, 200)
    early, late = max(pages.blocks[:40]) - pages.blocks[0], max(pages.blocks[40:]) - pages.blocks[0]
    assert late < 1.2 * early < 300_000
    assert max(pages.arrow_bytes) < 16 << 20


# --- S3 and Google Cloud Storage


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> Server:
    server: Server = request.getfixturevalue("s3_server" if request.param == "s3" else "gcs_server")
    return server


def test_an_object_goes_before_a_folder_and_a_folder_before_a_prefix(store: Server) -> None:
    bucket, options = store.make_bucket(), store.storage_options
    for name in ("photo", "photo/1.jpg", "photo/2/3.jpg", "photos/4.jpg", "photo.jpg", "img_1.jpg", "img_2.jpg"):
        base = store.put(bucket, name, b"x").removesuffix(f"/{name}")
    assert listed(f"{base}/photo", options, base) == ["photo"]
    assert listed(f"{base}/photo/", options, base) == ["photo/1.jpg", "photo/2/3.jpg"]
    assert listed(f"{base}/photos", options, base) == ["photos/4.jpg"]
    assert listed(f"{base}/img_", options, base) == ["img_1.jpg", "img_2.jpg"]
    assert len(listed(base, options)) == len(listed(f"{base}/", options)) == 7
    assert listed(f"{base}/photo/2", options, base) == ["photo/2/3.jpg"]
    assert listed(f"{base}/none", options) == []


def test_folder_markers_are_no_objects(store: Server) -> None:
    bucket = store.make_bucket()
    for name in ("a/", "a/b/", "a/b/1.jpg"):
        base = store.put(bucket, name, b"x").removesuffix(f"/{name}")
    assert listed(f"{base}/a", store.storage_options, base) == ["a/b/1.jpg"]


def test_entries_carry_size_and_etag(store: Server) -> None:
    bucket = store.make_bucket()
    url = store.put(bucket, "x.jpg", b"12345")
    (before,) = list_source(url, store.storage_options)
    store.put(bucket, "x.jpg", b"54321")
    (after,) = list_source(url, store.storage_options)
    assert (before.uri, before.size, after.size) == (url, 5, 5)
    assert before.etag
    assert after.etag
    assert before.etag != after.etag


def test_more_keys_than_a_page(store: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.stores._PAGE", 40)
    names = [f"{number:04d}.jpg" for number in range(121)]
    tree(tmp_path, names)
    base = store.upload(tmp_path, store.make_bucket(), "many")
    assert listed(base, store.storage_options, base) == names
    assert rows_of(spec_of(f"{base}/*7.jpg", storage_options=store.storage_options)) == [
        f"{base}/{name}" for name in names if name.endswith("7.jpg")
    ]


def test_other_names_of_a_scheme_are_the_same_objects(s3_server: S3Server) -> None:
    url = s3_server.put(s3_server.make_bucket(), "x.jpg", b"x")
    assert listed(url.replace("s3://", "s3a://"), s3_server.storage_options) == [url]


def test_a_bucket_that_is_not_there(store: Server) -> None:
    scheme = "s3" if isinstance(store, S3Server) else "gs"
    with pytest.raises(SourceError, match=f"{scheme}://no-such-bucket-here/x: no such"):
        listed(f"{scheme}://no-such-bucket-here/x", store.storage_options)
    with pytest.raises(SourceError, match="name of the bucket cannot be a pattern"):
        listed(f"{scheme}://bucket-*/x", store.storage_options)


def test_denied_listings_say_so(store: Server, flaky_proxy: Any) -> None:
    bucket = store.make_bucket()
    url = store.put(bucket, "x.jpg", b"x")
    proxy = flaky_proxy(store, [Rule("status", status=403)])
    with pytest.raises(SourceError, match=r"access is denied; check the credentials"):
        listed(url, proxy.server.storage_options)


def test_without_credentials_the_error_says_how_to_give_them(
    s3_server: S3Server, set_env: Callable[[Any], None]
) -> None:
    set_env({"AWS_ENDPOINT_URL": s3_server.endpoint_url})
    with pytest.raises(SourceError, match=r'no credentials were found .* \{"anon": true\}'):
        listed("s3://bucket/x")


def test_listing_goes_on_after_faults_that_pass(store: Server, flaky_proxy: Any, tmp_path: Path) -> None:
    tree(tmp_path, [f"{number}.jpg" for number in range(5)])
    base = store.upload(tmp_path, store.make_bucket(), "in")
    proxy = flaky_proxy(store, [Rule("status", status=503, first=1)])
    assert len(listed(base, proxy.server.storage_options)) == 5
    assert proxy.control.faults() > 0


# --- web servers


def test_an_index_page_is_a_folder(tmp_path: Path, http_server: Callable[..., HttpServer]) -> None:
    tree(tmp_path, ["a.jpg", "b c.png", "sub/d.jpg", "sub/deep/é.jpg", "other/f.jpg"])
    server = http_server(tmp_path, [Rule("status", status=503, first=1)])
    assert listed(f"{server.url}/sub/") == [f"{server.url}/sub/d.jpg", server.url_of("sub/deep/é.jpg")]
    assert len(listed(f"{server.url}/")) == 5
    before = server.control.requests("/other/")
    assert listed(f"{server.url}/sub/*/*.jpg") == [server.url_of("sub/deep/é.jpg")]
    assert listed(f"{server.url}/*.png") == [server.url_of("b c.png")]
    assert len(listed(f"{server.url}/**/*.jpg")) == 4
    assert server.control.requests("/other/") == before + 1


def test_links_that_sort_the_index_anew_are_no_files(tmp_path: Path, http_server: Callable[..., HttpServer]) -> None:
    links = ("?C=N;O=D", "../", "/", "x.jpg", "#top")
    page = " ".join(f'<a href="{link}">link</a>' for link in links)
    server = http_server(tmp_path, [Rule("status", path="/photos/", status=200, body=f"<html>{page}</html>")])
    assert listed(f"{server.url}/photos/") == [f"{server.url}/photos/x.jpg"]


def test_an_index_that_is_not_there(tmp_path: Path, http_server: Callable[..., HttpServer]) -> None:
    server = http_server(tmp_path, [Rule("status", path="/closed/", status=403)])
    with pytest.raises(SourceError, match="/none/: no such file"):
        listed(f"{server.url}/none/")
    with pytest.raises(SourceError, match="/closed/: access is denied"):
        listed(f"{server.url}/closed/")
    assert server.control.requests("/closed/") == 1


def test_signed_urls_stay_as_they_are() -> None:
    url = "https://h.example/a%20b/x*y.jpg?X-Amz-Signature=a%2Fb*%3D&X-Amz-Date=1#frag"
    plain = url.replace("*", "")
    assert listed(plain) == [plain]
    assert listed("http://h.example/photo[1]?.jpg") == ["http://h.example/photo[1]?.jpg"]


def test_an_error_about_a_signed_url_keeps_the_signature_to_itself(
    tmp_path: Path, http_server: Callable[..., HttpServer]
) -> None:
    server = http_server(tmp_path, [Rule("status", status=403)])
    for name in ("table.parquet", "table.csv", "shard.tar", "folder/"):
        with pytest.raises(SourceError) as raised:
            rows_of(spec_of(f"{server.url}/{name}?X-Amz-Signature=s3cr3t&a=b"))
        assert "s3cr3t" not in str(raised.value)
        assert name in str(raised.value)


# --- include, exclude, limit, the output below the source


def test_include_and_exclude_look_at_the_address_and_at_its_last_segment() -> None:
    assert wanted("s3://b/cats/1.jpg", ("*.jpg",), ())
    assert wanted("s3://b/cats/1.jpg", ("s3://b/cats/*",), ())
    assert not wanted("s3://b/cats/1.jpg", ("*.png", "dogs/*"), ())
    assert not wanted("s3://b/cats/1.jpg", ("*.jpg",), ("*/cats/*",))
    assert not wanted("s3://b/cats/.DS_Store", (), (".*",))


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
