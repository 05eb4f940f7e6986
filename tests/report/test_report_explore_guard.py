"""What the server of `explore` refuses: other sites, other names, other machines, files, and too much."""

import socket
from pathlib import Path
from urllib.parse import quote

import pytest
from report.album import Album
from report.explore_client import Client, serving
from support.runs import jpeg

from pipeline.report import explore_server
from pipeline.report.explore_server import MAX_UPLOAD_BYTES, ExploreServer, uploaded_file
from pipeline.report.explore_state import open_exploration
from pipeline.report.run import open_run
from schemas.errors import OutputError, SpecError

TOKEN = "a long; enough token%&"


def test_report_explore_upload_that_is_too_large(client: Client) -> None:
    status, _, body = client.upload(b"\xff\xd8" + bytes(MAX_UPLOAD_BYTES))
    assert status == 413
    assert "32 MiB" in body.decode()


def test_report_explore_refuses_posts_of_other_sites(client: Client) -> None:
    data = jpeg((1, 2, 3))
    assert client.upload(data, headers={"Origin": "https://elsewhere.example"})[0] == 403
    assert client.upload(data, headers={"Origin": "null"})[0] == 403
    assert client.upload(data, headers={"Origin": f"http://127.0.0.1:{client.port}"})[0] == 303
    assert client.request("/", method="POST", body=b"")[0] == 404
    assert client.request("/", method="PUT", body=b"")[0] == 501


def test_report_explore_of_a_connection_that_asks_nothing(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(explore_server._Handler, "timeout", 0.1)
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as silent:
        assert silent.recv(1) == b"", "it is closed"
    assert "could not be answered" not in caplog.text


@pytest.mark.parametrize(
    "host", ["elsewhere.example", "127.0.0.1.elsewhere.example", "localhost.", "[::ffff:1]", "[", ""]
)
def test_report_explore_answers_to_localhost_only(client: Client, host: str) -> None:
    status, _, body = client.request("/", headers={"Host": host})
    assert status == 421
    assert b"localhost" in body


@pytest.mark.parametrize(
    "host", ["localhost:1", "127.0.0.1", "127.0.0.2:8000", "LOCALHOST", "[::1]:80", "[0:0:0:0:0:0:0:1]"]
)
def test_report_explore_answers_under_each_local_name(client: Client, host: str) -> None:
    assert client.request("/", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    "target",
    [
        "/../run.json",
        "/..%2frun.json",
        "/run.json",
        "//etc/passwd",
        "/style.css/../../run.py",
        "/templates/base.css",
        "/%00",
    ],
)
def test_report_explore_serves_no_files(client: Client, target: str) -> None:
    status, _, body = client.request(target)
    assert status == 404
    assert b"run_id" not in body


def test_report_explore_sends_a_strict_policy(client: Client) -> None:
    for target in ("/", "/thumbnail?row=1", "/style.css", "/nowhere"):
        _, headers, _ = client.request(target)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "script-src" not in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_report_explore_with_a_token(explored: tuple[Album, Path]) -> None:
    _, run = explored
    with serving(open_exploration(open_run(str(run), {}), None), token=TOKEN) as server:
        client = Client(server)
        assert client.request("/")[0] == 401
        assert client.request("/thumbnail?row=1")[0] == 401
        assert client.request("/?token=wrong")[0] == 401
        assert client.upload(b"")[0] == 401
        status, headers, _ = client.request(f"/clusters?name=colours&token={quote(TOKEN)}")
        assert (status, headers["location"]) == (303, "/clusters?name=colours")
        assert "HttpOnly" in headers["set-cookie"]
        cookie = headers["set-cookie"].partition(";")[0]
        assert client.request("/clusters", headers={"Cookie": cookie})[0] == 200
        again = client.request(f"/?page=1&token={quote(TOKEN)}", headers={"Cookie": cookie})
        assert (again[0], again[1]["location"]) == (303, "/?page=1")
        assert client.request("/clusters", headers={"Cookie": f"{cookie}x"})[0] == 401
        for others in ('prefs={"a":1}', "na me=1", "x[1]=2", "bare", "=", ""):
            assert client.request("/clusters", headers={"Cookie": f"{others}; {cookie}; z=@"})[0] == 200, others
        assert client.request("/clusters", headers={"Authorization": f"Bearer {TOKEN}"})[0] == 200
        _, headers, _ = client.request(f"/%5celsewhere.example?token={quote(TOKEN)}")
        assert headers["location"] == "/"


def test_report_explore_behind_a_proxy_on_this_machine(explored: tuple[Album, Path]) -> None:
    _, run = explored
    with serving(open_exploration(open_run(str(run), {}), None), token=TOKEN) as server:
        client, asked = Client(server), {"Host": "photos.example"}
        assert client.request("/", headers=asked)[0] == 401
        status, headers, _ = client.request(f"/?token={quote(TOKEN)}", headers=asked)
        assert (status, headers["location"]) == (303, "/")
        known = {**asked, "Cookie": headers["set-cookie"].partition(";")[0]}
        assert client.request("/", headers=known)[0] == 200
        data = jpeg((1, 2, 3))
        no_model = client.upload(data, headers={**known, "Origin": "https://photos.example"})
        assert (no_model[0], b"No search by picture" in no_model[2]) == (404, True)
        assert client.upload(data, headers={**known, "Origin": "https://elsewhere.example"})[0] == 403


def test_report_explore_other_hosts_need_a_token(explored: tuple[Album, Path]) -> None:
    _, run = explored
    exploration = open_exploration(open_run(str(run), {}), None)
    with pytest.raises(SpecError, match="--token"):
        ExploreServer(exploration, "0.0.0.0", 0, None)
    with pytest.raises(SpecError, match="at least 8"):
        ExploreServer(exploration, "0.0.0.0", 0, "short")
    with serving(exploration, "0.0.0.0", TOKEN) as server:
        client = Client(server)
        assert client.request("/", headers={"Host": "this.machine.example"})[0] == 401
        allowed = {"Host": "this.machine.example", "Authorization": f"Bearer {TOKEN}"}
        assert client.request("/", headers=allowed)[0] == 200


def test_report_explore_port_in_use(explored: tuple[Album, Path]) -> None:
    _, run = explored
    exploration = open_exploration(open_run(str(run), {}), None)
    with serving(exploration) as server, pytest.raises(OutputError, match="--port"):
        ExploreServer(exploration, "127.0.0.1", int(server.server_address[1]), None)


def test_report_uploaded_file_is_cut_out_exactly() -> None:
    data = b"\r\n--not the boundary\r\n\x00\xff--b\r\n"
    body = (
        b'--b\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\nContent-Type: image/png\r\n\r\n'
        + data
        + b"\r\n--b--\r\n"
    )
    assert uploaded_file('multipart/form-data; boundary="b"', body) == data
    assert uploaded_file("multipart/form-data", body) == b""
    assert uploaded_file("multipart/form-data; boundary*=utf-8''b", body) == b""
    assert uploaded_file("application/json", body) == b""
