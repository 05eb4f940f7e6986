"""Addresses in `pipeline/storage.py`: whom the options are for, and what may be shown of a signed URL."""

import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.gcs import GcsServer
from support.s3 import S3Server

from jobs.cli import run_command
from pipeline.addresses import absolute, scheme
from pipeline.storage import filesystem, is_local, options_for, redact
from schemas.errors import SourceError, SpecError

SetEnv = Callable[[Mapping[str, str]], None]


def test_redact_signed_urls() -> None:
    s3 = (
        "https://b.s3.amazonaws.com/a%20b.jpg?versionId=3&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AK%2F20260101"
        "&X-Amz-Date=20260101T000000Z&X-Amz-Expires=60&X-Amz-Security-Token=tok&X-Amz-Signature=c0ffee"
    )
    assert redact(s3) == (
        "https://b.s3.amazonaws.com/a%20b.jpg?versionId=3&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=…"
        "&X-Amz-Date=20260101T000000Z&X-Amz-Expires=…&X-Amz-Security-Token=…&X-Amz-Signature=…"
    )
    assert redact("https://b/k?AWSAccessKeyId=AK&Expires=1&Signature=a%2Bb") == (
        "https://b/k?AWSAccessKeyId=…&Expires=…&Signature=…"
    )
    assert redact("https://storage.googleapis.com/b/k?GoogleAccessId=me@x&X-Goog-Credential=c&X-Goog-Signature=s") == (
        "https://storage.googleapis.com/b/k?GoogleAccessId=…&X-Goog-Credential=…&X-Goog-Signature=…"
    )
    assert redact("https://a.blob.core.windows.net/c/k?sv=2024&sp=r&sig=abc%3D") == (
        "https://a.blob.core.windows.net/c/k?sv=2024&sp=r&sig=…"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:password@host:8080/a.jpg", "https://host:8080/a.jpg"),
        ("https://user:p@ss@host/a@2x.jpg", "https://host/a@2x.jpg"),
        ("simplecache::https://u:p@host/a.zip?token=x", "simplecache::https://host/a.zip?token=…"),
        (
            "GET https://u:p@host/a?key=1 failed, http://x/?api_key=2",
            "GET https://host/a?key=… failed, http://x/?api_key=…",
        ),
        ("https://host/#access_token=x", "https://host/#access_token=…"),
        (
            "Pool(host='h'): Max retries exceeded with url: /tokeninfo?access_token=x (Caused by",
            "Pool(host='h'): Max retries exceeded with url: /tokeninfo?access_token=… (Caused by",
        ),
        ("abfss://c@a.dfs.core.windows.net/k?sv=1&sig=x", "abfss://c@a.dfs.core.windows.net/k?sv=1&sig=…"),
        ('"GET /a?page=2&sig=x HTTP/1.1" 403', '"GET /a?page=2&sig=… HTTP/1.1" 403'),
    ],
)
def test_redact_users_and_keys(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "/data/a?token=x",
        "/my url: photos/a?token=x",
        "s3://bucket/a b/é#1.jpg",
        "https://host/a.jpg?design=1&keyword=cat&page=2&empty=&flag",
        "memory://a",
        "file:///a",
        "http://[broken",
        *(f"{scheme}://container@account/a.jpg" for scheme in ("abfs", "abfss", "az", "wasb", "wasbs", "oci")),
        "simplecache::abfss://container@account/a.jpg",
        "https://host/?",
    ],
)
def test_redact_leaves_the_rest_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_schemes_and_their_aliases() -> None:
    urls = ("/a", "file:///a", "s3a://b/k", "gcs://b/k", "https://h/k", "memory://k")
    assert [scheme(url) for url in urls] == ["file", "file", "s3", "gs", "http", "memory"]


@pytest.mark.parametrize("given", ["~/{}", "file://~/{}", "file://{home}/{}", "file:{home}/{}", "local://{home}/{}"])
@pytest.mark.parametrize("name", ["out", "a b%20#?x", "~old/out", "out/"])
def test_an_absolute_address_is_where_files_go(set_env: SetEnv, tmp_path: Path, given: str, name: str) -> None:
    set_env({"HOME": str(tmp_path)})
    url = given.format(name, home=tmp_path)
    assert absolute(url) == f"{tmp_path}/{name}".rstrip("/")
    assert filesystem(url, {})[1].rstrip("/") == absolute(url)


def test_addresses_that_are_absolute_already(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("./out/../in") == absolute("in") == f"{tmp_path}/in"
    assert absolute("zip://a.png::x.zip") == f"zip://a.png::{tmp_path}/x.zip"
    assert absolute("simplecache::file://in/") == f"simplecache::file://{tmp_path}/in"
    for url in ("s3://b/~/k", "memory://k", "zip://a::/b", "zip://a::file:///b", "s3://b/a::c", "https://h/~me/k"):
        assert absolute(url) == url


def test_flat_options_are_for_every_remote_scheme() -> None:
    options = {"anon": True, "client_kwargs": {"endpoint_url": "http://x"}}
    assert options_for("s3://b/k", options) == options
    assert options_for("gs://b/k", options) == options
    assert options_for("/a", options) == {}
    only_a_dict = {"client_kwargs": {"endpoint_url": "http://x"}}
    assert options_for("s3://b/k", only_a_dict) == only_a_dict


def test_a_web_server_gets_no_key_of_a_bucket() -> None:
    keys = {"key": "k", "secret": "s", "endpoint_url": "http://x", "token": "t"}
    client = {"client_kwargs": {"endpoint_url": "http://x", "aws_session_token": "t"}}
    assert options_for("https://h/k", {**keys, **client}) == {"client_kwargs": {}}
    web = {"headers": {"Authorization": "b"}, "timeout": 1, "client_kwargs": {"trust_env": True}}
    assert options_for("https://h/k", web) == web
    assert options_for("https://h/k", {**keys, **web}) == web


def test_basic_authentication_becomes_a_header() -> None:
    header = {"Authorization": "Basic bWU6aMO8c2g="}
    for given in ({"auth": ["me", "hüsh"]}, {"https": {"auth": ["me", "hüsh"]}}):
        assert options_for("https://h/k", given) == {"headers": header}
    more = {"http": {"auth": ["me", "hüsh"], "headers": {"A": "b"}, "client_kwargs": {"auth": ["me", "hüsh"]}}}
    expected = {"headers": {**header, "A": "b"}, "client_kwargs": {"headers": header}}
    assert options_for("https://h/k", more) == expected
    assert options_for("s3://b/k", {"auth": ["me", "hüsh"]}) == {"auth": ["me", "hüsh"]}


def test_options_by_scheme() -> None:
    options = {"s3a": {"anon": True}, "gs": {"token": "anon"}, "https": {"timeout": 1}}
    assert options_for("s3://b/k", options) == {"anon": True}
    assert options_for("gcs://b/k", options) == {"token": "anon"}
    assert options_for("http://h/k", options) == {"timeout": 1}
    assert options_for("memory://k", options) == {}
    assert options_for("/a", options) == {}
    assert options_for("s3://b/k", {}) == {}


def test_options_of_both_kinds_are_refused() -> None:
    with pytest.raises(SpecError, match=r"keyed by scheme \(s3\), but these are not: anon"):
        options_for("s3://b/k", {"s3": {"key": "k"}, "anon": True})


def test_options_of_a_cache_in_the_middle_of_a_chain(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("in/a.png", b"A")
    options = {"simplecache": {"cache_storage": str(tmp_path / "kept")}, "s3": {"key": "k"}}
    fs, path = filesystem(f"zip://in/a.png::simplecache::file://{tmp_path}/x.zip", options)
    assert fs.cat_file(path) == b"A"
    assert [file.read_bytes() for file in (tmp_path / "kept").iterdir()] == [(tmp_path / "x.zip").read_bytes()]


def test_listings_are_never_cached(s3_server: S3Server, gcs_server: GcsServer) -> None:
    for name, server in (("s3", s3_server), ("gs", gcs_server)):
        bucket = server.make_bucket()
        fs, path = filesystem(f"{name}://{bucket}/in", server.storage_options)
        server.put(bucket, "in/a", b"1")
        assert len(fs.ls(path)) == 1
        server.put(bucket, "in/b", b"2")
        assert len(fs.ls(path)) == 2


def test_unknown_schemes() -> None:
    with pytest.raises(SourceError, match=r"nope://x/y: no file system for this address"):
        filesystem("nope://x/y", {})


class TokenExchange(MemoryFileSystem):
    """A driver that asks for its credentials when it is opened, and tells what it sent."""

    cachable = False

    def __init__(self, **_: Any) -> None:
        raise ConnectionError("Max retries exceeded with url: /tokeninfo?access_token=hush (Caused by …)")


def test_a_driver_that_fails_when_it_is_opened_tells_no_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gs", TokenExchange)
    for more in ((), ("--storage-options", '{"gs": {"token": "hush"}}')):
        assert run_command(["status", "gs://bucket/out", *more]) == 2
    monkeypatch.setenv("PATCHSTREAM_VERBOSE", "1")
    assert run_command(["status", "gs://bucket/out"]) == 2
    shown = capsys.readouterr().err
    assert "gs://bucket/out: cannot be opened (ConnectionError: Max retries" in shown
    assert "hush" not in shown


def test_which_file_systems_are_local(tmp_path: Path) -> None:
    assert is_local(filesystem(str(tmp_path), {})[0])
    assert not is_local(filesystem("memory://x", {})[0])


@pytest.mark.parametrize("address", ["FILE:///tmp/A b", "File:///tmp/A b", "file:///tmp/A b"])
def test_a_scheme_may_be_written_in_capitals(address: str) -> None:
    assert scheme(address) == "file"
    assert absolute(address) == "/tmp/A b"
    fs, path = filesystem(address, {})
    assert (is_local(fs), path) == (True, "/tmp/A b")


def test_capitals_behind_the_scheme_and_in_paths_stay() -> None:
    assert scheme("HTTPS://Host/A.jpg") == "http"
    assert scheme("S3A://Bucket/Key") == "s3"
    assert absolute("S3://Bucket/Key") == "S3://Bucket/Key"
    assert filesystem("Memory://A/B", {})[1] == "/A/B"
