"""The test servers do what the tests that use them rely on, faults included."""

import contextlib
import http.client
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pytest
from support.faults import Rule, throttled
from support.http_server import HttpServer
from support.ports import free_port, is_open
from support.processes import RUNNING, TESTS, running, serving

BODY = random.Random(1).randbytes(20_000)
StartHttp = Callable[..., HttpServer]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    site = tmp_path / "site"
    (site / "sub dir").mkdir(parents=True)
    (site / "a.jpg").write_bytes(BODY)
    (site / "sub dir" / "b é#.jpg").write_bytes(BODY[:100])
    return site


@contextlib.contextmanager
def asked(
    server: HttpServer, target: str, method: str = "GET", headers: dict[str, str] | None = None
) -> Iterator[http.client.HTTPResponse]:
    parts = urlsplit(server.url)
    with contextlib.closing(http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=5)) as connection:
        connection.request(method, target, headers=headers or {})
        yield connection.getresponse()


def get(server: HttpServer, target: str = "/a.jpg", headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    with asked(server, target, headers=headers) as response:
        return response.status, response.read()


# --- a folder over HTTP


@pytest.mark.parametrize(
    ("byte_range", "status", "body"),
    [
        ("bytes=0-9", 206, BODY[:10]),
        ("bytes=19990-", 206, BODY[-10:]),
        ("bytes=-5", 206, BODY[-5:]),
        ("bytes=19990-99999", 206, BODY[-10:]),
        ("bytes=20000-", 416, b""),
    ],
)
def test_ranges(http_server: StartHttp, folder: Path, byte_range: str, status: int, body: bytes) -> None:
    assert get(http_server(folder), headers={"Range": byte_range}) == (status, body)


def test_head_validators_and_connections_that_stay_open(http_server: StartHttp, folder: Path) -> None:
    server = http_server(folder)
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=5)
    connection.request("HEAD", "/a.jpg")
    head = connection.getresponse()
    assert (head.status, head.read(), head.headers["Content-Length"]) == (200, b"", "20000")
    kept = connection.sock
    connection.request("GET", "/a.jpg", headers={"If-None-Match": head.headers["ETag"]})
    again = connection.getresponse()
    assert (again.status, again.read()) == (304, b"")
    assert connection.sock is kept
    connection.close()


def test_nothing_outside_the_folder_is_served(http_server: StartHttp, folder: Path) -> None:
    (folder.parent / "secret").write_text("no")
    assert get(http_server(folder), "/%2e%2e/secret")[0] == 403


def test_fsspec_finds_and_reads_what_the_index_pages_list(http_server: StartHttp, folder: Path) -> None:
    server = http_server(folder)
    fs = fsspec.filesystem("http")
    assert sorted(fs.find(server.url)) == [server.url_of("a.jpg"), server.url_of("sub dir/b é#.jpg")]
    assert fs.glob(f"{server.url}/*.jpg") == [server.url_of("a.jpg")]
    assert fs.cat_file(server.url_of("sub dir/b é#.jpg")) == BODY[:100]
    assert fs.cat_file(server.url_of("a.jpg"), start=5, end=25) == BODY[5:25]


# --- faults


def test_the_first_requests_fail_then_the_next_succeeds(http_server: StartHttp, folder: Path) -> None:
    server = http_server(folder, [Rule("status", path="/a.jpg", status=503, first=2)])
    assert [get(server)[0] for _ in range(4)] == [503, 503, 200, 200]
    assert get(server, "/sub%20dir/")[0] == 200
    assert server.control.requests("/a.jpg") == 4
    assert server.control.requests("/sub dir/") == 1
    assert server.control.faults() == 2


def test_throttling_says_when_to_come_back(http_server: StartHttp, folder: Path) -> None:
    with asked(http_server(folder, [throttled(7)]), "/a.jpg") as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "7")


def test_reset_in_the_middle_of_the_body(http_server: StartHttp, folder: Path) -> None:
    server = http_server(folder, [Rule("reset", after_bytes=1000)])
    with asked(server, "/a.jpg") as response:
        assert response.headers["Content-Length"] == "20000"
        with pytest.raises(ConnectionResetError):
            response.read()


def test_truncated_body_is_shorter_than_declared(http_server: StartHttp, folder: Path) -> None:
    server = http_server(folder, [Rule("truncate", after_bytes=1000)])
    with asked(server, "/a.jpg") as response, pytest.raises(http.client.IncompleteRead) as error:
        response.read()
    assert error.value.partial == BODY[:1000]


def test_cut_body_looks_whole(http_server: StartHttp, folder: Path) -> None:
    server = http_server(folder, [Rule("cut", after_bytes=1000)])
    assert get(server) == (200, BODY[:1000])


def test_slow_body_keeps_its_rate(http_server: StartHttp, folder: Path) -> None:
    server = http_server(folder, [Rule("slow", bytes_per_s=40_000)])
    begin = time.monotonic()
    assert get(server) == (200, BODY)
    assert time.monotonic() - begin > 0.4  # 0.5 s at that rate, less the last step


def test_stalled_body_never_ends(http_server: StartHttp, folder: Path) -> None:
    server = http_server(folder, [Rule("stall", after_bytes=10)])
    with asked(server, "/a.jpg") as response:
        assert response.read(10) == BODY[:10]
        assert response.fp is not None
        response.fp.raw._sock.settimeout(0.3)  # type: ignore[attr-defined]
        with pytest.raises(TimeoutError):
            response.read(1)


def test_delay_comes_before_the_first_byte(http_server: StartHttp, folder: Path) -> None:
    server = http_server(folder, [Rule("delay", delay_s=0.3)])
    begin = time.monotonic()
    assert get(server) == (200, BODY)
    assert time.monotonic() - begin >= 0.3


@pytest.mark.parametrize(("fault", "header"), [("chunked", "Transfer-Encoding"), ("no_length", "Connection")])
def test_bodies_without_a_length(http_server: StartHttp, folder: Path, fault: str, header: str) -> None:
    with asked(http_server(folder, [Rule(fault)]), "/a.jpg") as response:  # type: ignore[arg-type]
        assert response.headers["Content-Length"] is None
        assert response.headers[header] is not None
        assert response.read() == BODY


def test_ignored_range(http_server: StartHttp, folder: Path) -> None:
    assert get(http_server(folder, [Rule("ignore_range")]), headers={"Range": "bytes=0-9"}) == (200, BODY)


@pytest.mark.parametrize("declared", [True, False])
def test_huge_body_starts_like_the_file(http_server: StartHttp, folder: Path, declared: bool) -> None:
    server = http_server(folder, [Rule("huge", size_bytes=10**12, declared=declared)])
    with asked(server, "/a.jpg") as response:
        assert response.headers["Content-Length"] == ("1000000000000" if declared else None)
        assert response.read(20_000 + 500) == BODY + bytes(500)


def test_small_huge_body_has_its_size(http_server: StartHttp, folder: Path) -> None:
    server = http_server(folder, [Rule("huge", size_bytes=150_000)])
    assert get(server) == (200, BODY + bytes(130_000))


def test_a_rate_is_kept_and_the_same_for_the_same_seed(http_server: StartHttp, folder: Path) -> None:
    def statuses(seed: int) -> list[int]:
        server = http_server(folder, [Rule("status", rate=0.3)], seed=seed)
        return [get(server)[0] for _ in range(200)]

    first = statuses(1)
    assert 30 <= first.count(503) <= 90  # 60 expected; five standard deviations are 32
    assert statuses(1) == first
    assert statuses(2) != first


def test_rules_change_while_the_server_runs(http_server: StartHttp, folder: Path) -> None:
    server = http_server(folder)
    assert get(server)[0] == 200
    server.control.set_rules(Rule("status", status=403, path="*.jpg"))
    assert [get(server)[0], get(server, "/")[0]] == [403, 200]
    server.control.set_rules()
    assert get(server)[0] == 200
    assert server.control.requests() == 4
    server.control.forget()
    assert server.control.requests() == 0


# --- processes


def assert_closes(port: int) -> None:
    deadline = time.monotonic() + 10
    while is_open(port) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_open(port)


def test_a_process_group_is_ended_with_its_leader(tmp_path: Path) -> None:
    port = free_port()
    listen = f"import http.server as h; h.HTTPServer(('127.0.0.1', {port}), h.SimpleHTTPRequestHandler).serve_forever()"
    # The shell ignores SIGTERM, so both must be killed; the server is its child.
    with running(
        ["bash", "-c", f'trap "" TERM; "{sys.executable}" -c "{listen}"; sleep 60'],
        name="group",
        log_dir=tmp_path,
        ready=lambda process: is_open(port),
        grace_s=0.2,
    ):
        assert is_open(port)
    assert_closes(port)


def test_what_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"(?s)broken ended before it was ready.*no such luck"),
        running(
            [sys.executable, "-c", "raise SystemExit('no such luck')"],
            name="broken",
            log_dir=tmp_path,
            ready=lambda process: False,
        ),
    ):
        pass
    assert not any(process.name == "broken" for process in RUNNING)


def test_children_heed_an_interrupt_also_where_the_tests_run_in_the_background() -> None:
    script = (
        "import signal, types, conftest; conftest.pytest_configure(types.SimpleNamespace(add_cleanup=lambda _: None))\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-W", "ignore", "-c", script]
    assert subprocess.check_output(command, text=True, env={**os.environ, "PYTHONPATH": str(TESTS)}) == "True\n"


def test_servers_end_when_the_tests_are_killed(tmp_path: Path, folder: Path) -> None:
    script = (
        "import os, time, sys; from pathlib import Path; from support.http_server import http_server\n"
        f"with http_server(Path({str(folder)!r}), log_dir=Path({str(tmp_path)!r})) as server:\n"
        "    print(server.url, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(TESTS)}
    )
    assert parent.stdout is not None
    port = urlsplit(parent.stdout.readline().strip()).port
    assert port is not None
    assert is_open(port)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert_closes(port)


def test_user_credentials_and_endpoints_are_out_of_reach(
    monkeypatch: pytest.MonkeyPatch, isolated_env: Callable[[dict[str, str]], dict[str, str]]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mine")
    monkeypatch.setenv("https_proxy", "http://proxy")
    env = isolated_env({"AWS_DEFAULT_REGION": "here"})
    assert "https_proxy" not in env
    assert {name: value for name, value in env.items() if name.startswith("AWS_")} == {
        "AWS_DEFAULT_REGION": "here",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    assert env["HF_HUB_OFFLINE"] == "1"
    assert not os.path.exists(os.path.join(env["HOME"], ".aws"))


def test_two_servers_side_by_side(tmp_path: Path, folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        plan = '{"seed": 0, "rules": []}'
        urls: list[Any] = [
            stack.enter_context(serving("support.http_child", str(folder), plan, log_dir=tmp_path)) for _ in range(3)
        ]
        assert len(set(urls)) == 3
