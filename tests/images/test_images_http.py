"""Images from a web server that fails in every way web servers fail, with the requests counted."""

import io
import socket
import socketserver
import threading
import time
import zipfile
from unittest.mock import Mock

import pytest
from PIL import Image
from support.faults import Rule, throttled
from support.manifests import decode_all, decode_batches, manifest_of
from support.testdata import needs_testdata, photos

from schemas.spec import FetchSpec


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "www"
    place.mkdir()
    for number in range(12):
        file = io.BytesIO()
        Image.effect_noise((160, 120), 60 + number).save(file, "PNG")
        (place / f"{number:02d}.png").write_bytes(file.getvalue())
    return place


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Waits of milliseconds, so that many tries fit into a test."""
    monkeypatch.setattr("pipeline.images.retry.BASE_S", 0.005)


def fetch(**options):
    return FetchSpec(**{"timeout_s": 10.0, "attempts": 4, **options})


def one(server, name="00.png", query="", **options):
    manifest = manifest_of([server.url_of(name) + query])
    (row,) = decode_all(manifest, fetch=fetch(**options)).to_pylist()
    return row


def test_healthy_server_one_request_each(http_server, folder):
    server = http_server(folder)
    manifest = manifest_of([server.url_of(f"{number:02d}.png") for number in range(12)])
    table = decode_all(manifest)
    assert table["error"].null_count == 12
    assert server.control.requests() == 12


@pytest.mark.parametrize("status", [425, 429, 500, 502, 503, 504, 507, 520, 530])
def test_transient_answers_are_tried_again(http_server, folder, status):
    server = http_server(folder, [Rule("status", status=status, first=2)])
    assert one(server)["error"] is None
    assert server.control.requests("/00.png") == 3


@pytest.mark.parametrize(
    ("status", "error", "retryable"),
    [(429, "Throttled", True), (503, "Throttled", True), (500, "ServerError", True), (504, "ServerError", True)],
)
def test_transient_answers_end_after_the_last_try(http_server, folder, status, error, retryable):
    server = http_server(folder, [Rule("status", status=status)])
    row = one(server)
    assert (row["stage"], row["error"], row["retryable"], row["attempts"]) == ("fetch", error, retryable, 4)
    assert str(status) in row["message"]
    assert server.control.requests("/00.png") == 4


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, "NotFound"), (410, "NotFound"), (403, "Forbidden"), (401, "Forbidden"), (400, "Http400"), (501, "Http501")],
)
def test_final_answers_are_asked_for_once(http_server, folder, status, error):
    server = http_server(folder, [Rule("status", status=status)])
    row = one(server)
    assert (row["error"], row["retryable"], row["attempts"]) == (error, status == 501, 1)
    assert server.control.requests("/00.png") == 1


# What no rule of the test server spoils: the head of the answer itself.
_UNREADABLE = [
    b"\0\1 no answer at all\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 20_000 + b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 1\r\n\r\nx",
]


@pytest.mark.parametrize("answer", _UNREADABLE, ids=["status line", "long header", "two lengths", "encoding"])
def test_an_unreadable_answer_is_the_servers_error(answer):
    asked = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline().strip():
                pass
            asked.append(1)
            self.wfile.write(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        uri = f"http://127.0.0.1:{server.server_address[1]}/a.png"
        (row,) = decode_all(manifest_of([uri]), fetch=fetch(attempts=3)).to_pylist()
        server.shutdown()
    assert (row["error"], row["retryable"], row["attempts"]) == ("ServerError", True, 3)
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("status", "error"),
    [(503, None), (503, "Throttled"), (500, "ServerError"), (403, "Forbidden"), (404, "NotFound")],
)
def test_a_container_is_missing_only_where_the_server_says_so(http_server, folder, status, error):
    """Tables and archives are looked at before they are read, and every failure there comes as a missing file."""
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.write(folder / "00.png", "a.png")
    server = http_server(folder, [Rule("status", status=status, first=1 if error is None else None)])
    (row,) = decode_all(manifest_of([f"zip://a.png::{server.url}/x.zip"]), fetch=fetch()).to_pylist()
    again = error in {"Throttled", "ServerError"}
    assert (row["error"], bool(row["retryable"]), row["attempts"]) == (error, again, error and (4 if again else 1))
    assert error is None or str(status) in row["message"]


def test_the_server_says_how_long_to_wait(http_server, folder):
    server = http_server(folder, [throttled(1, first=1)])
    started = time.monotonic()
    assert one(server)["error"] is None
    assert time.monotonic() - started >= 1.0
    assert server.control.requests("/00.png") == 2


def test_a_wait_longer_than_the_time_limit_is_not_begun(http_server, folder):
    server = http_server(folder, [throttled(3600)])
    row = one(server, timeout_s=5.0)
    assert (row["error"], row["retryable"], row["attempts"]) == ("Throttled", True, 1)
    assert "3600" in row["message"]


@pytest.mark.parametrize("fault", ["reset", "truncate"])
@pytest.mark.parametrize("after_bytes", [0, 1000])
def test_a_broken_connection_is_tried_again(http_server, folder, fault, after_bytes):
    server = http_server(folder, [Rule(fault, after_bytes=after_bytes, first=2)])
    assert one(server)["error"] is None
    assert server.control.requests("/00.png") == 3


def test_a_body_shorter_than_its_length_is_never_decoded(http_server, folder):
    server = http_server(folder, [Rule("truncate", after_bytes=2000)])
    row = one(server)
    assert (row["stage"], row["error"], row["retryable"], row["attempts"]) == ("fetch", "TruncatedBody", True, 4)
    assert row["pixels"] is None


def test_a_truncated_file_that_is_served_as_if_whole_fails_to_decode(http_server, folder):
    server = http_server(folder, [Rule("cut", after_bytes=2000)])
    row = one(server)
    assert (row["stage"], row["error"], row["retryable"]) == ("decode", "Truncated", False)
    assert server.control.requests("/00.png") == 1


@pytest.mark.parametrize(
    "rule", [Rule("stall", after_bytes=500), Rule("slow", bytes_per_s=100), Rule("delay", delay_s=30)]
)
def test_the_time_limit_bounds_an_image_all_tries_together(http_server, folder, rule):
    server = http_server(folder, [rule])
    started = time.monotonic()
    row = one(server, timeout_s=1.5)
    assert 1.3 < time.monotonic() - started < 10
    assert (row["stage"], row["error"], row["retryable"]) == ("fetch", "TimedOut", True)


def test_a_stalled_image_does_not_hold_up_the_others(http_server, folder):
    server = http_server(folder, [Rule("stall", path="/03.png")])
    manifest = manifest_of([server.url_of(f"{number:02d}.png") for number in range(12)])
    started = time.monotonic()
    table = decode_all(manifest, fetch=fetch(timeout_s=1.5))
    assert time.monotonic() - started < 10
    assert table["error"].to_pylist() == [None] * 3 + ["TimedOut"] + [None] * 8


@pytest.mark.parametrize("fault", ["chunked", "no_length"])
def test_a_body_without_a_declared_length_is_read_whole(http_server, folder, fault):
    server = http_server(folder, [Rule(fault)])
    assert one(server)["error"] is None


@pytest.mark.parametrize("declared", [True, False])
def test_a_huge_body_is_given_up_without_reading_it(http_server, folder, declared):
    server = http_server(folder, [Rule("huge", size_bytes=1 << 40, declared=declared)])
    started = time.monotonic()
    row = one(server, max_bytes=8 << 20)
    assert (row["stage"], row["error"], row["retryable"]) == ("fetch", "TooManyBytes", False)
    assert time.monotonic() - started < 5
    assert server.control.requests("/00.png") == 1


def test_a_size_known_from_the_listing_saves_the_request(http_server, folder):
    server = http_server(folder)
    (row,) = decode_all(manifest_of([server.url_of("00.png")], size=[1 << 40])).to_pylist()
    assert row["error"] == "TooManyBytes"
    assert server.control.requests() == 0


SIGNED = "?X-Amz-Credential=AKIAEXAMPLE%2F20260101%2Fus-east-1&X-Amz-Signature=deadbeef%2Bfeed%3D%3D&x=a+b%20c&y=%7e"


def test_a_signed_address_arrives_as_it_was_given(http_server, folder):
    server = http_server(folder)
    assert one(server, query=SIGNED)["error"] is None
    (entry,) = server.control.stats()["log"]
    assert entry[1] == f"/00.png{SIGNED}"


@pytest.mark.parametrize("name", ["set(1).png", "set[1].png", "it's.png"])
def test_brackets_and_quotes_do_not_hide_a_signature(http_server, folder, name):
    server = http_server(folder, [Rule("status", status=403)])
    address = f"zip://a.png::{server.url}/{name}{SIGNED}"
    (row,) = decode_all(manifest_of([address]), fetch=fetch(timeout_s=5.0, attempts=1)).to_pylist()
    for secret in ("deadbeef", "feed", "AKIAEXAMPLE"):
        assert secret not in row["message"]


@pytest.mark.parametrize(
    "rule", [Rule("status", status=403), Rule("truncate"), Rule("reset"), Rule("huge"), Rule("stall"), Rule("status")]
)
def test_no_signature_and_no_password_reaches_a_message(http_server, folder, rule):
    server = http_server(folder, [rule])
    address = server.url_of("00.png").replace("http://", "http://user:hunter2@") + SIGNED
    (row,) = decode_all(manifest_of([address]), fetch=fetch(timeout_s=1.0, attempts=2)).to_pylist()
    assert row["stage"] == "fetch"
    for secret in ("deadbeef", "feed", "AKIAEXAMPLE", "hunter2"):
        assert secret not in row["message"]
    assert "00.png" in row["message"]


def test_addresses_that_lead_nowhere(monkeypatch):
    # No resolver is asked: one that drops packets would be waited for longer than the image has.
    monkeypatch.setattr("socket.getaddrinfo", Mock(side_effect=socket.gaierror(socket.EAI_NONAME, "not known")))
    uris = ["http://127.0.0.1:9/a.png", "http://no-such-host.invalid/a.png", "http://[broken/a.png", "http:///a.png"]
    table = decode_all(manifest_of(uris), fetch=fetch(attempts=2))
    assert set(table["stage"].to_pylist()) == {"fetch"}
    assert table["error"].to_pylist()[:2] == ["ConnectionFailed"] * 2
    assert table["attempts"].to_pylist()[:2] == [2, 2]
    assert table["error"].null_count == 0


def test_an_address_with_spaces_and_other_alphabets_is_quoted(http_server, folder):
    (folder / "a b ü.png").write_bytes((folder / "00.png").read_bytes())
    server = http_server(folder)
    (row,) = decode_all(manifest_of([f"{server.url}/a b ü.png"])).to_pylist()
    assert row["error"] is None


def test_a_third_of_all_requests_failing_loses_no_row(http_server, folder):
    rules = [
        Rule("status", status=503, rate=0.15),
        Rule("reset", rate=0.1),
        Rule("truncate", rate=0.1, after_bytes=300),
    ]
    server = http_server(folder, rules, seed=3)
    manifest = manifest_of([server.url_of(f"{number % 12:02d}.png") + f"?n={number}" for number in range(300)])
    table = decode_all(manifest, fetch=fetch(attempts=12), batch_rows=64)
    assert table["row"].to_pylist() == list(range(300))
    assert table["error"].null_count == 300
    assert server.control.faults() > 50
    assert server.control.requests() == 300 + server.control.faults()


def test_reads_in_flight_are_as_many_as_asked_for(http_server, folder):
    server = http_server(folder, [Rule("delay", delay_s=0.05)])
    manifest = manifest_of([server.url_of(f"{number % 12:02d}.png") for number in range(60)])
    decode_all(manifest, fetch=fetch(concurrency=5))
    assert server.control.stats()["most_in_flight"] == 5


def test_fetching_goes_on_while_nothing_is_asked_for(http_server, folder):
    server = http_server(folder)
    batches = decode_batches(manifest_of([server.url_of(f"{n % 12:02d}.png") for n in range(40)]), batch_rows=4)
    assert next(batches).num_rows == 4
    deadline = time.monotonic() + 10
    while server.control.requests() < 40 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.control.requests() == 40
    assert sum(batch.num_rows for batch in batches) == 36


@needs_testdata
def test_photographs_over_http_equal_the_local_ones(http_server):
    files = photos(24)
    server = http_server(files[0].parent, [Rule("reset", rate=0.2, after_bytes=5000)], seed=1)
    local = decode_all(manifest_of(files))
    remote = decode_all(manifest_of([server.url_of(path.name) for path in files]), fetch=fetch(attempts=10))
    assert remote.select(["pixels", "sha256", "width"]).equals(local.select(["pixels", "sha256", "width"]))
