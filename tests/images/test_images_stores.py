"""Images from real S3 and Google Cloud Storage endpoints, healthy and failing, with the requests counted."""

import functools
import http.server
import io
import threading
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from gcsfs.extended_gcsfs import ExtendedGcsFileSystem
from PIL import Image
from support.faults import Rule
from support.manifests import decode_all, manifest_of
from support.shards import listed, shades

from pipeline.images.reader import Reader, _single_try_gcs
from schemas.errors import SourceError
from schemas.spec import FetchSpec


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("pipeline.images.retry.BASE_S", 0.005)


@pytest.fixture(params=["s3", "gs"])
def store(request):
    return request.getfixturevalue({"s3": "s3_server", "gs": "gcs_server"}[request.param])


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def fetch(**options):
    return FetchSpec(**{"timeout_s": 15.0, "attempts": 4, **options})


@pytest.fixture
def filled(store):
    """Ten pictures in a bucket of their own: their URLs."""
    return fill(store, store.make_bucket())


def fill(store, bucket):
    return [store.put(bucket, f"some folder/{n:02d} ä+%.png", png(n)) for n in range(10)]


def test_objects_are_read_in_order(store, filled):
    table = decode_all(manifest_of(filled), storage_options=store.storage_options)
    assert table["error"].to_pylist() == [None] * 10
    assert [pixels[0] for pixels in table["pixels"].to_pylist()] == list(range(10))


def test_two_colons_in_a_key_are_no_chain(store):
    bucket = store.make_bucket()
    urls = [store.put(bucket, name, png(n)) for n, name in enumerate(("a.png", "a.png::crop.png", "x::y/b.png"))]
    table = decode_all(manifest_of(urls[::-1]), storage_options=store.storage_options)
    assert table["error"].to_pylist() == [None] * 3
    assert [pixels[0] for pixels in table["pixels"].to_pylist()] == [2, 1, 0]


@pytest.mark.parametrize("first", [0, 1])
def test_a_version_is_the_one_that_its_address_names_whichever_row_leads(s3_server, first):
    bucket, fs = s3_server.make_bucket(), s3fs.S3FileSystem(**s3_server.storage_options)
    fs.call_s3("put_bucket_versioning", Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    old, _ = [fs.call_s3("put_object", Bucket=bucket, Key="a?.png", Body=png(n))["VersionId"] for n in (1, 2)]
    urls = [f"s3://{bucket}/a?.png?versionId={old}", f"s3://{bucket}/a?.png"]
    table = decode_all(manifest_of([urls[first], urls[1 - first]]), storage_options=s3_server.storage_options)
    assert shades(table) == [1 + first, 2 - first], table["message"]


@pytest.mark.parametrize("first", [0, 1])
def test_a_number_behind_a_hash_is_part_of_the_key_whichever_row_leads(gcs_server, first):
    bucket = gcs_server.make_bucket()
    urls = [gcs_server.put(bucket, name, png(n)) for n, name in enumerate(("photo", "photo#2"), 1)]
    table = decode_all(manifest_of([urls[first], urls[1 - first]]), storage_options=gcs_server.storage_options)
    assert shades(table) == [1 + first, 2 - first], table["message"]


def test_one_request_for_an_object_of_known_or_unknown_size(store, filled, flaky_proxy):
    proxy = flaky_proxy(store)
    for size in (None, len(png(0))):
        proxy.control.forget()
        table = decode_all(manifest_of(filled, size=[size] * 10), storage_options=proxy.server.storage_options)
        assert table["error"].null_count == 10
        assert proxy.control.requests() == 10


def test_a_missing_object_and_a_missing_bucket(store, filled):
    missing = [filled[0].replace("00 ", "none "), f"{filled[0].partition('://')[0]}://no-such-bucket/a.png"]
    table = decode_all(manifest_of(missing), storage_options=store.storage_options)
    assert table["error"].to_pylist() == ["NotFound", "NotFound"]
    assert table["attempts"].to_pylist() == [1, 1]
    assert table["retryable"].to_pylist() == [False, False]


@pytest.mark.parametrize(("status", "error"), [(503, "Throttled"), (429, "Throttled"), (500, "ServerError")])
def test_our_rule_for_retries_is_the_only_one(store, filled, flaky_proxy, status, error):
    """Neither s3fs, botocore nor gcsfs tries again behind our back."""
    proxy = flaky_proxy(store, [Rule("status", status=status)])
    (row,) = decode_all(
        manifest_of(filled[:1]), storage_options=proxy.server.storage_options, fetch=fetch(attempts=3)
    ).to_pylist()
    assert (row["stage"], row["error"], row["retryable"], row["attempts"]) == ("fetch", error, True, 3)
    assert proxy.control.requests() == 3


@pytest.mark.parametrize(("status", "error"), [(503, "Throttled"), (429, "Throttled"), (500, "ServerError")])
def test_our_rule_for_retries_is_the_only_one_for_tables_too(store, flaky_proxy, tmp_path, status, error):
    pq.write_table(pa.table({"image": [png(3)]}), tmp_path / "a.parquet")
    url = store.put(store.make_bucket(), "a.parquet", (tmp_path / "a.parquet").read_bytes())
    manifest = listed(url, store.storage_options)
    proxy = flaky_proxy(store, [Rule("status", status=status)])
    fetched = functools.partial(decode_all, manifest, storage_options=proxy.server.storage_options)
    (row,) = fetched(fetch=fetch(attempts=3)).to_pylist()
    assert (row["error"], row["retryable"], row["attempts"]) == (error, True, 3)
    assert 3 <= proxy.control.requests() <= 6  # gcsfs asks at the same time whether it is a folder
    proxy.control.set_rules(Rule("status", status=status, first=1))
    assert shades(fetched(fetch=fetch(attempts=9))) == [3]


def test_what_kind_a_bucket_is_of_is_asked_once():
    """The class that gcsfs gives unless told otherwise asks so before it opens a table."""
    asking = ExtendedGcsFileSystem(token="anon", skip_instance_cache=True)
    assert _single_try_gcs(asking).retry_config["timeout"] < 0.1


@pytest.mark.parametrize("rule", [Rule("status", first=2), Rule("reset", first=2), Rule("truncate", first=2)])
def test_what_passes_is_tried_until_it_does(store, filled, flaky_proxy, rule):
    proxy = flaky_proxy(store, [rule])
    table = decode_all(manifest_of(filled[:1]), storage_options=proxy.server.storage_options, fetch=fetch())
    assert table["error"].to_pylist() == [None]
    assert proxy.control.requests() == 3


def test_a_denied_object_is_asked_for_once(store, filled, flaky_proxy):
    proxy = flaky_proxy(store, [Rule("status", status=403)])
    (row,) = decode_all(manifest_of(filled[:1]), storage_options=proxy.server.storage_options).to_pylist()
    assert (row["error"], row["retryable"], row["attempts"]) == ("Forbidden", False, 1)
    assert proxy.control.requests() == 1


def test_a_stalled_object_times_out(store, filled, flaky_proxy):
    proxy = flaky_proxy(store, [Rule("stall", after_bytes=20)])
    (row,) = decode_all(
        manifest_of(filled[:1]), storage_options=proxy.server.storage_options, fetch=fetch(timeout_s=1.5)
    ).to_pylist()
    assert (row["error"], row["retryable"]) == ("TimedOut", True)
    assert row["fetch_s"] < 10


def test_an_object_above_the_byte_limit_is_not_read(store):
    bucket = store.make_bucket()
    url = store.put(bucket, "big.png", bytes(2 << 20))
    for size in (None, 2 << 20):
        (row,) = decode_all(
            manifest_of([url], size=[size]), storage_options=store.storage_options, fetch=fetch(max_bytes=1 << 20)
        ).to_pylist()
        assert (row["stage"], row["error"], row["retryable"]) == ("fetch", "TooManyBytes", False)


def test_a_quarter_of_all_requests_failing_loses_no_row(store, flaky_proxy):
    # Faults are drawn from addresses: under a name that changes, a run in thousands would meet too few or too many.
    filled = fill(store, store.make_bucket("a-quarter-of-all-requests"))
    rules = [
        Rule("status", rate=0.1),
        Rule("reset", rate=0.1, after_bytes=20),
        Rule("truncate", rate=0.1, after_bytes=9),
    ]
    proxy = flaky_proxy(store, rules, seed=5)
    table = decode_all(
        manifest_of(filled * 8), storage_options=proxy.server.storage_options, fetch=fetch(attempts=12), batch_rows=64
    )
    assert table["error"].null_count == 80
    assert [pixels[0] for pixels in table["pixels"].to_pylist()] == list(range(10)) * 8
    assert proxy.control.faults() > 10


def test_credentials_come_from_the_environment_too(store, filled, set_env):
    set_env(store.env)
    assert decode_all(manifest_of(filled[:2]))["error"].to_pylist() == [None, None]


def test_options_of_a_bucket_leave_web_addresses_alone(s3_server, http_server, tmp_path):
    """One table may name both, and options without a scheme are for every store."""
    (tmp_path / "web.png").write_bytes(png(7))
    url = s3_server.put(s3_server.make_bucket(), "a.png", png(3))
    server = http_server(tmp_path)
    flat = {**s3_server.storage_options, "use_ssl": False}
    table = decode_all(manifest_of([url, server.url_of("web.png")]), storage_options=flat)
    assert table["message"].to_pylist() == [None, None]
    assert [pixels[0] for pixels in table["pixels"].to_pylist()] == [3, 7]


@pytest.fixture
def locked(tmp_path):
    """The address of a web server that gives `a.png` and `x.zip`, which holds `a.png`, to `me` with `hush` alone."""
    (tmp_path / "a.png").write_bytes(png(3))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self):
            if self.headers["Authorization"] != "Basic bWU6aHVzaA==":
                return self.send_error(401)
            return super().send_head()

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("options", [{"auth": ["me", "hush"]}, {"http": {"client_kwargs": {"auth": ["me", "hush"]}}}])
def test_basic_authentication_for_a_web_server(locked, options):
    table = decode_all(manifest_of([f"{locked}/a.png"]), storage_options=options)
    assert shades(table) == [3], table["message"]
    assert listed(f"{locked}/a.png", options)["uri"].to_pylist() == [f"{locked}/a.png"]


def test_an_option_that_the_driver_does_not_take_is_no_missing_file(locked):
    options = {"http": {"timeout_s": 5}}
    (row,) = decode_all(manifest_of([f"zip://a.png::{locked}/x.zip"]), storage_options=options).to_pylist()
    assert (row["error"], row["retryable"]) == ("TypeError", True)
    assert "timeout_s" in row["message"]
    with pytest.raises(SourceError, match=r"x\.zip: cannot be read \(TypeError"):
        listed(f"zip://*.png::{locked}/x.zip", options)


@pytest.mark.parametrize("form", ["flat", "by scheme"])
def test_options_reach_the_store_behind_an_archive(store, form, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("in/a.png", png(3))
    url = store.put(store.make_bucket(), "x.zip", (tmp_path / "x.zip").read_bytes())
    options = store.storage_options if form == "flat" else {url.partition(":")[0]: store.storage_options}
    manifest = listed(f"zip://in::{url}", options)
    assert manifest["uri"].to_pylist() == [f"zip://in/a.png::{url}"]
    assert decode_all(manifest, storage_options=options)["message"].to_pylist() == [None]


def test_options_reach_the_store_behind_a_member_with_a_question_mark(store, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("in/what?.png", png(3))
    url = store.put(store.make_bucket(), "x.zip", (tmp_path / "x.zip").read_bytes())
    options = {url.partition(":")[0]: store.storage_options}
    manifest = listed(f"zip://in/w?at*::{url}", options)
    assert manifest["uri"].to_pylist() == [f"zip://in/what?.png::{url}"]
    assert shades(decode_all(manifest, storage_options=options)) == [3]


def test_one_client_serves_all_threads_and_later_calls(store, filled, monkeypatch):
    """Setting one up costs S3 half a second; fsspec would make one for each thread and call."""
    seen = []
    original = Reader._open
    monkeypatch.setattr(Reader, "_open", lambda self, kind: seen.append(original(self, kind)) or seen[-1])
    for _ in range(3):
        table = decode_all(manifest_of(filled * 4), storage_options=store.storage_options)
        assert table["error"].null_count == 40
    assert len(seen) == 3
    assert seen[0] is seen[1] is seen[2]
