"""The S3 and Google Cloud Storage servers do what clients of the real ones rely on, also behind a flaky proxy."""

import http.client
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pytest
from support.faults import Rule
from support.flaky_proxy import FlakyProxy
from support.gcs import GcsServer
from support.s3 import S3Server

Server = S3Server | GcsServer
StartProxy = Callable[..., FlakyProxy[Any]]
MIB = 1 << 20
# Enough for moto, which looks whether a request is signed, not how.
SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request"}


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> Server:
    server: Server = request.getfixturevalue("s3_server" if request.param == "s3" else "gcs_server")
    return server


def file_system(server: Server, **options: Any) -> Any:
    protocol = "s3" if isinstance(server, S3Server) else "gs"
    return fsspec.filesystem(protocol, **server.storage_options, use_listings_cache=False, **options)


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


# --- what clients rely on


@pytest.mark.parametrize("tail", [b"", b"\r", b"\n", b"\r\n"])
def test_objects_come_back_byte_for_byte(store: Server, tail: bytes) -> None:
    fs, bucket = file_system(store), store.make_bucket()
    fs.pipe_file(f"{bucket}/a b/é#?.bin", noise(5000) + tail)
    assert fs.cat_file(f"{bucket}/a b/é#?.bin") == noise(5000) + tail


def test_ranges(store: Server) -> None:
    fs, bucket = file_system(store), store.make_bucket()
    store.put(bucket, "x", noise(1000))
    assert fs.cat_file(f"{bucket}/x", start=10, end=20) == noise(1000)[10:20]
    assert fs.cat_file(f"{bucket}/x", start=-10) == noise(1000)[-10:]
    assert fs.cat_file(f"{bucket}/x", start=990, end=5000) == noise(1000)[990:]
    with fs.open(f"{bucket}/x") as file:
        file.seek(500)
        assert file.read(7) == noise(1000)[500:507]


def test_a_range_past_the_end_is_refused(store: Server) -> None:
    bucket = store.make_bucket()
    store.put(bucket, "x", b"12345")
    target = f"/{bucket}/x" if isinstance(store, S3Server) else f"/storage/v1/b/{bucket}/o/x?alt=media"
    parts = urlsplit(store.endpoint_url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=5)
    headers = {
        "Range": "bytes=5-9",
        "Authorization": "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request",
    }
    connection.request("GET", target, headers=headers)
    assert connection.getresponse().status == 416
    connection.close()


def test_exclusive_writes_have_one_winner(store: Server) -> None:
    fs, bucket = file_system(store), store.make_bucket()

    def won(number: int) -> bool:
        try:
            fs.pipe_file(f"{bucket}/lock", b"%d" % number, mode="create")
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number, success in enumerate(pool.map(won, range(16))) if success]
    assert len(winners) == 1
    assert fs.cat_file(f"{bucket}/lock") == b"%d" % winners[0]


def test_listing_copying_and_removing(store: Server, tmp_path: Path) -> None:
    fs, bucket = file_system(store), store.make_bucket()
    for name in ("b/2", "b/1", "a", "b/c/3"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    url = store.upload(tmp_path / "tree", bucket, "in/")
    names = [f"{bucket}/in/{name}" for name in ("a", "b/1", "b/2", "b/c/3")]
    assert url.endswith(f"://{bucket}/in")
    assert fs.find(f"{bucket}/in") == names
    assert fs.glob(f"{bucket}/in/b/*") == [names[1], names[2], f"{bucket}/in/b/c"]
    assert sorted(fs.ls(f"{bucket}/in", detail=False)) == [names[0], f"{bucket}/in/b"]
    assert (fs.info(names[1])["size"], bool(fs.info(names[1])["ETag" if url[0] == "s" else "etag"])) == (3, True)
    fs.cp_file(names[0], f"{bucket}/copy")
    fs.mv(f"{bucket}/copy", f"{bucket}/moved")
    assert fs.cat_file(f"{bucket}/moved") == b"a"
    fs.rm(f"{bucket}/in", recursive=True)
    assert fs.find(bucket) == [f"{bucket}/moved"]


def test_what_is_not_there(store: Server) -> None:
    fs, bucket = file_system(store), store.make_bucket()
    for missing in (f"{bucket}/none", "no-such-bucket/none"):
        with pytest.raises(FileNotFoundError):
            fs.cat_file(missing)
    with pytest.raises(FileNotFoundError):
        fs.pipe_file("no-such-bucket/x", b"x")


def test_large_objects_in_parts(store: Server) -> None:
    fs, bucket, data = file_system(store), store.make_bucket(), noise(11 * MIB)
    fs.pipe_file(f"{bucket}/x", data, chunksize=5 * MIB)
    assert fs.cat_file(f"{bucket}/x") == data
    with pytest.raises(FileExistsError):
        fs.pipe_file(f"{bucket}/x", data, chunksize=5 * MIB, mode="create")


def test_google_listings_come_in_pages(gcs_server: GcsServer) -> None:
    fs, bucket = file_system(gcs_server), gcs_server.make_bucket()
    names = [f"p/{number:02}" for number in range(7)] + ["p/sub/x", "p/sub/y", "q"]
    for name in names:
        gcs_server.put(bucket, name, b"x")

    def pages(**query: Any) -> list[list[str]]:
        found, token = [], None
        while True:
            page = fs.call("GET", "b/{}/o", bucket, json_out=True, pageToken=token, **query)
            found.append([item["name"] for item in page.get("items", [])] + page.get("prefixes", []))
            token = page.get("nextPageToken")
            if token is None:
                return found

    assert pages(prefix="p/", maxResults=4) == [names[0:4], names[4:8], names[8:9]]
    assert pages(prefix="p/", delimiter="/", maxResults=5) == [names[:5], [*names[5:7], "p/sub/"]]
    assert pages(startOffset="p/05", endOffset="q") == [names[5:9]]
    assert len(fs.find(bucket)) == 10


# --- from another process, through the environment alone

_READ = "import fsspec, sys; sys.stdout.write(fsspec.open(sys.argv[1]).open().read().decode())"


def test_the_environment_is_enough_for_another_process(
    store: Server, isolated_env: Callable[[Mapping[str, str]], dict[str, str]]
) -> None:
    url = store.put(store.make_bucket(), "x", b"hello")
    command = [sys.executable, "-c", _READ, url]
    assert subprocess.run(command, env=isolated_env(store.env), capture_output=True, check=True).stdout == b"hello"


def test_the_environment_is_enough_in_this_process(store: Server, set_env: Callable[[Mapping[str, str]], None]) -> None:
    url = store.put(store.make_bucket(), "x", b"hello")
    set_env(store.env)
    with fsspec.open(url) as file:
        assert file.read() == b"hello"


# --- behind a flaky proxy


def test_clients_get_through_a_server_that_fails_now_and_then(store: Server, flaky_proxy: StartProxy) -> None:
    proxy = flaky_proxy(
        store, [Rule("status", methods=("PUT", "POST"), first=1), Rule("reset", methods=("GET",), first=1)]
    )
    fs, bucket = file_system(proxy.server), store.make_bucket()
    fs.pipe_file(f"{bucket}/x", noise(1000))
    assert fs.cat_file(f"{bucket}/x") == noise(1000)
    assert proxy.control.faults(["status"]) == 1
    assert proxy.control.faults(["reset"]) == 1


def test_a_lost_answer_to_a_write_that_happened(store: Server, flaky_proxy: StartProxy) -> None:
    writes = ("PUT", "POST")
    proxy = flaky_proxy(store, [Rule("status", methods=writes, first=1, forward=True)])
    fs, bucket = file_system(proxy.server), store.make_bucket()
    with pytest.raises(FileExistsError):
        fs.pipe_file(f"{bucket}/x", b"once", mode="create")  # sent again after the 503, it meets itself
    proxy.control.set_rules(Rule("status", methods=writes, first=1))
    fs.pipe_file(f"{bucket}/y", b"once", mode="create")
    assert fs.cat_file(f"{bucket}/x") == fs.cat_file(f"{bucket}/y") == b"once"


def test_parts_of_a_large_write_are_sent_again(s3_server: S3Server, flaky_proxy: StartProxy) -> None:
    proxy = flaky_proxy(s3_server, [Rule("status", path="*partNumber=2*", first=1)])
    fs, bucket, data = file_system(proxy.server), s3_server.make_bucket(), noise(11 * MIB)
    fs.pipe_file(f"{bucket}/x", data, chunksize=5 * MIB)
    assert file_system(s3_server).cat_file(f"{bucket}/x") == data
    second = [entry for entry in proxy.control.stats()["log"] if "partNumber=2&" in entry[1]]
    assert [(method, fault) for method, _, _, fault in second] == [("PUT", "status"), ("PUT", None)]


def test_writes_are_denied_from_now_on(store: Server, flaky_proxy: StartProxy) -> None:
    proxy = flaky_proxy(store)
    fs, bucket = file_system(proxy.server), store.make_bucket()
    fs.pipe_file(f"{bucket}/x", b"before")
    proxy.control.deny_writes()
    with pytest.raises(OSError, match=r"(?i)denied|forbidden"):
        fs.pipe_file(f"{bucket}/x", b"after")
    assert fs.cat_file(f"{bucket}/x") == b"before"
    proxy.control.set_rules()
    fs.pipe_file(f"{bucket}/x", b"after")


def test_a_bucket_vanishes(store: Server, flaky_proxy: StartProxy) -> None:
    proxy = flaky_proxy(store)
    fs, bucket = file_system(proxy.server), store.make_bucket()
    fs.pipe_file(f"{bucket}/x", b"before")
    proxy.control.vanish()
    with pytest.raises(FileNotFoundError):
        fs.pipe_file(f"{bucket}/x", b"after")
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{bucket}/x")


def test_slow_and_truncated_reads_pass_the_proxy_spoilt(s3_server: S3Server, flaky_proxy: StartProxy) -> None:
    proxy = flaky_proxy(s3_server, [Rule("truncate", methods=("GET",), after_bytes=100)])
    bucket = s3_server.make_bucket()
    target = urlsplit(s3_server.put(bucket, "x", noise(1000)))
    parts = urlsplit(proxy.server.endpoint_url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=5)
    connection.request("GET", f"/{target.netloc}{target.path}", headers=SIGNED)
    with pytest.raises(http.client.IncompleteRead) as error:
        connection.getresponse().read()
    assert error.value.partial == noise(1000)[:100]
    connection.close()
