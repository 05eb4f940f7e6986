"""What a source string stands for on S3, on Google Cloud Storage and on a web server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.faults import Rule
from support.gcs import GcsServer
from support.http_server import HttpServer
from support.s3 import S3Server
from support.source_rows import listed, rows_of, spec_of, tree

from pipeline.sources.listing import list_source
from schemas.errors import SourceError

Server = S3Server | GcsServer


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


def test_a_folder_that_is_called_as_a_pattern_goes_before_it(store: Server) -> None:
    bucket, options = store.make_bucket(), store.storage_options
    for name in ("run[1]/a.jpg", "run[1]/deep/b.jpg", "run1/c.jpg", "any?/d.jpg", "anyx/e.jpg"):
        base = store.put(bucket, name, b"x").removesuffix(f"/{name}")
    for source in (f"{base}/run[1]/", f"{base}/run[1]"):
        assert listed(source, options, base) == ["run[1]/a.jpg", "run[1]/deep/b.jpg"]
    assert listed(f"{base}/any?/", options, base) == ["any?/d.jpg"]
    assert listed(f"{base}/run[1]/*.jpg", options, base) == listed(f"{base}/run[1]*", options, base) == ["run1/c.jpg"]


def test_two_colons_in_a_key_are_no_chain(store: Server) -> None:
    bucket, options = store.make_bucket(), store.storage_options
    for name in ("a.jpg", "a.jpg::crop.jpg", "x::y/b.jpg"):
        base = store.put(bucket, name, b"x").removesuffix(f"/{name}")
    assert listed(base, options, base) == ["a.jpg", "a.jpg::crop.jpg", "x::y/b.jpg"]
    assert listed(f"{base}/a.jpg::crop.jpg", options, base) == ["a.jpg::crop.jpg"]
    assert listed(f"{base}/x::y", options, base) == ["x::y/b.jpg"]
    assert listed(f"{base}/x::*/b.jpg", options, base) == ["x::y/b.jpg"]


@pytest.mark.parametrize("cache", ["simplecache", "filecache", "blockcache"])
def test_behind_a_cache_lies_what_it_leads_to(tmp_path: Path, cache: str) -> None:
    tree(tmp_path / "in", ["a.jpg", "b/c.jpg"])
    base = f"{cache}::file://{tmp_path}/in"
    assert listed(base) == [f"{base}/a.jpg", f"{base}/b/c.jpg"]
    assert listed(f"{cache}::{tmp_path}/in/*.jpg") == [f"{base}/a.jpg"]
    (tmp_path / "in/list.csv").write_text("uri\na.jpg\n../d.jpg\n")
    options = {cache: {"cache_storage": str(tmp_path / "kept")}}
    rows = rows_of(spec_of(f"{base}/list.csv", storage_options=options))
    assert rows == [f"{base}/a.jpg", f"{cache}::file://{tmp_path}/d.jpg"]


def test_a_cache_hides_no_store(store: Server) -> None:
    bucket, options = store.make_bucket(), store.storage_options
    url = store.put(bucket, "photo/1.jpg", b"x")
    by_scheme = {url.partition(":")[0]: options}
    for given in (options, by_scheme):
        assert listed(f"simplecache::{url.removesuffix('1.jpg')}", given) == [f"simplecache::{url}"]


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
    assert listed(f"{server.url}/s*/") == listed(f"{server.url}/s*") == listed(f"{server.url}/sub/")
    assert server.control.requests("/other/") == before + 1


def test_what_is_encoded_in_a_glob_on_the_web_is_no_wildcard(
    tmp_path: Path, http_server: Callable[..., HttpServer]
) -> None:
    tree(tmp_path, ["q [1]/a*b.jpg", "q [1]/axb.jpg", "q [1]/s?/c.jpg", "q [1]/sx/c.jpg", "q 1/d[1].jpg", "q 1/d1.jpg"])
    server = http_server(tmp_path)
    below = [server.url_of(f"q [1]/{name}") for name in ("a*b.jpg", "axb.jpg", "s?/c.jpg", "sx/c.jpg")]
    assert listed(f"{server.url}/q%20%5B1%5D/*.jpg") == below[:2]
    assert listed(f"{server.url}/*/a%2ab.jpg") == below[:1]
    assert listed(f"{server.url}/*/s%3F/c.jpg") == below[2:3]
    assert listed(f"{server.url}/*/d%5b1%5D.jpg") == [server.url_of("q 1/d[1].jpg")]
    assert listed(f"{server.url}/*/[ad][1x]*.jpg") == [below[1], server.url_of("q 1/d1.jpg")]


def test_links_that_sort_the_index_anew_are_no_files(tmp_path: Path, http_server: Callable[..., HttpServer]) -> None:
    links = ("?C=N;O=D", "../", "/", "x.jpg", "#top")
    page = " ".join(f'<a href="{link}">link</a>' for link in links)
    server = http_server(tmp_path, [Rule("status", path="/photos/", status=200, body=f"<html>{page}</html>")])
    assert listed(f"{server.url}/photos/") == [f"{server.url}/photos/x.jpg"]


def test_a_link_is_read_as_a_browser_reads_it(tmp_path: Path, http_server: Callable[..., HttpServer]) -> None:
    """Apache writes `&amp;` for the `&` of a name, and quotes no apostrophe."""

    def page(path: str, *hrefs: str) -> Rule:
        links = "".join(f"<li><a class='x' href={href}>link</a>" for href in hrefs)
        return Rule(
            "status",
            path=path,
            status=200,
            body=f"<html><!doctype html><![foo[x]]><!-- <a href='no.jpg'> --><ul>{links}</ul></html>",
        )

    names = ['"Tom%20&amp;%20Jerry.jpg"', '"it\'s.jpg"', "'say&quot;a&quot;.jpg'", "bare.jpg"]
    names += ['"bed&notebook.jpg"', '"R&amplifier.jpg"', '"so&copy.jpg"', '"R&D.jpg"']
    folders = ['"Bob\'s/"', '"R&amp;D/"']
    outside = ('"../"', '"Bob\'s/../../q/y.jpg"', '"//h.example/p/z.jpg"', '"mailto:me@h.example"', "'http://[::/'")
    server = http_server(
        tmp_path,
        [
            page("/p/", *names, *folders, *outside, '"x.jpg?C=M&amp;O=A"'),
            page("/p/Bob's/", '"1.jpg"', '"./a:b.jpg"'),
            page("/p/R&D/", '"R&amp;D.jpg"', '"/p/R&amp;D/2.jpg"'),
        ],
    )
    assert listed(f"{server.url}/p/", below=f"{server.url}/p") == [
        *("R&D.jpg", "R&amplifier.jpg", "Tom%20&%20Jerry.jpg", "bare.jpg", "bed&notebook.jpg", "it's.jpg"),
        *('say"a".jpg', "so©.jpg"),
        *("Bob's/1.jpg", "Bob's/a:b.jpg", "R&D/2.jpg", "R&D/R&D.jpg"),
    ]
    whole = f"{server.url}/p/it's.jpg"
    server.control.set_rules(page("/p/", f'"{whole}"'))
    assert listed(f"{server.url}/p/") == [whole]
    assert listed(f"{server.url}//x/../p/") == [f"{server.url}//x/../p/it's.jpg"]


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
    for url in (
        "photo[1]?.jpg",
        "render/?id=5",
        "folder/?X-Amz-Signature=a",
        "a.jpg?sig=a/",
        "render/?of=/a/",
        "app/#/a/",
    ):
        assert listed(f"http://h.example/{url}") == [f"http://h.example/{url}"]


def test_an_error_about_a_signed_url_keeps_the_signature_to_itself(
    tmp_path: Path, http_server: Callable[..., HttpServer]
) -> None:
    server = http_server(tmp_path, [Rule("status", status=403)])
    page = server.url.replace("://", "://me:s3cr3t@") + "/folder/"
    signed = {
        name: f"{server.url}/{name}?X-Amz-Signature=s3cr3t&a=b" for name in ("table.parquet", "table.csv", "shard.tar")
    }
    for name, url in {**signed, "folder/": page}.items():
        with pytest.raises(SourceError) as raised:
            rows_of(spec_of(url))
        assert "s3cr3t" not in str(raised.value)
        assert name in str(raised.value)
