"""The direct way to S3 objects: the signature is botocore's, and whatever is unusual goes through s3fs."""

import http.server
import io
import threading
from datetime import UTC, datetime
from urllib.parse import quote

import botocore.auth
import pytest
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from PIL import Image
from support.faults import Rule
from support.manifests import decode_all, manifest_of

from pipeline.images.sigv4 import signed_headers
from schemas.spec import FetchSpec

NOW = datetime(2026, 3, 1, 12, 34, 56, tzinfo=UTC)
URLS = [
    "https://bucket.s3.eu-west-1.amazonaws.com/folder/a.jpg",
    "http://127.0.0.1:9000/bucket/a%20b%2B%C3%A4~.jpg",
    "https://s3.amazonaws.com:443/my.bucket/%3Fx%3D1%23.png",
    "http://localhost:80/bucket//double/./dots/../a.png",
]


@pytest.mark.parametrize("token", [None, "a/session+token=="])
@pytest.mark.parametrize("url", URLS)
def test_the_signature_equals_botocores(monkeypatch, url, token):
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: NOW.replace(tzinfo=None), raising=False)
    credentials = ReadOnlyCredentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", token)
    request = AWSRequest("GET", url, headers={})
    botocore.auth.S3SigV4Auth(credentials, "s3", "eu-west-1").add_auth(request)
    expected = {name.lower(): value for name, value in request.headers.items()}
    moment = datetime.strptime(expected["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    ours = signed_headers(url, credentials, "eu-west-1", moment)
    assert {name.lower(): value for name, value in ours.items()} == expected


class Recorder(http.server.BaseHTTPRequestHandler):
    """Answers every GET with the same picture, or with what `answers` says, and keeps what it was sent."""

    protocol_version = "HTTP/1.1"
    requests: list
    answers: dict

    def do_GET(self):
        self.requests.append((self.path, dict(self.headers.items())))
        status, headers, body = self.answers.get(self.path.partition("?")[0], (200, {}, picture()))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def picture():
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 9, 9)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def endpoint():
    Handler = type("Handler", (Recorder,), {"requests": [], "answers": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", Handler
        server.shutdown()


def options(url, **more):
    return {"key": "AK", "secret": "SK", "client_kwargs": {"endpoint_url": url, "region_name": "eu-west-1"}, **more}


def get(url, name="bucket/a.png", **more):
    (row,) = decode_all(manifest_of([f"s3://{name}"]), storage_options=options(url, **more)).to_pylist()
    return row


def test_what_arrives_is_signed_for_exactly_what_arrives(endpoint):
    url, server = endpoint
    name = "bucket/some folder/ä+b=c&d'(~)!*.png"
    assert get(url, name)["error"] is None
    ((path, headers),) = server.requests
    assert path == "/" + quote(name, safe="/~")
    moment = datetime.strptime(headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    expected = signed_headers(url + path, ReadOnlyCredentials("AK", "SK", None), "eu-west-1", moment)
    assert headers["Authorization"] == expected["Authorization"]
    assert headers["Host"] == url.removeprefix("http://")


def test_anonymous_access_is_not_signed(endpoint):
    url, server = endpoint
    row = decode_all(
        manifest_of(["s3://bucket/a.png"]),
        storage_options={"anon": True, "client_kwargs": {"endpoint_url": url, "region_name": "eu-west-1"}},
    )
    assert row["error"].to_pylist() == [None]
    ((_, headers),) = server.requests
    assert "Authorization" not in headers


def test_a_session_token_is_sent_and_signed(endpoint):
    url, server = endpoint
    assert get(url, token="the-token")["error"] is None
    ((_, headers),) = server.requests
    assert headers["x-amz-security-token"] == "the-token"
    assert "x-amz-security-token" in headers["Authorization"]


@pytest.mark.parametrize(
    "more", [{"requester_pays": True}, {"s3_additional_kwargs": {"SSECustomerAlgorithm": "AES256"}}]
)
def test_unusual_access_goes_through_s3fs(endpoint, more):
    url, server = endpoint
    assert get(url, **more)["error"] is None
    ((_, headers),) = server.requests
    assert "Botocore" in headers["User-Agent"]


def test_a_bucket_that_is_elsewhere_is_left_to_s3fs(endpoint):
    """A redirect is never followed with our signature; botocore is asked, here to find the same place."""
    url, server = endpoint
    server.answers["/bucket/a.png"] = (400, {"x-amz-bucket-region": "us-west-2"}, b"<Error><Code>X</Code></Error>")
    assert get(url)["stage"] == "fetch"
    assert len(server.requests) >= 2
    agents = ["Botocore" in headers["User-Agent"] for _, headers in server.requests]
    assert agents[0] is False
    assert all(agents[1:])


@pytest.mark.parametrize("status", [403, 404])
def test_a_final_answer_is_asked_for_once(endpoint, status):
    url, server = endpoint
    server.answers["/bucket/a.png"] = (status, {}, b"<Error><Code>NoSuchKey</Code></Error>")
    row = get(url)
    assert row["error"] == {403: "Forbidden", 404: "NotFound"}[status]
    assert row["message"].startswith("s3://bucket/a.png")
    assert len(server.requests) == 1


def test_without_credentials_the_row_says_so(endpoint, set_env, tmp_path):
    url, server = endpoint
    set_env({"AWS_CONFIG_FILE": str(tmp_path / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")})
    row = decode_all(
        manifest_of(["s3://bucket/a.png"]),
        storage_options={"client_kwargs": {"endpoint_url": url, "region_name": "eu-west-1"}},
        fetch=FetchSpec(timeout_s=10),
    ).to_pylist()[0]
    assert (row["error"], row["retryable"], row["attempts"]) == ("NoCredentials", True, 1)
    assert server.requests == []


@pytest.mark.parametrize("rule", [Rule("status"), Rule("reset"), Rule("truncate")])
def test_the_way_through_s3fs_keeps_our_rule_for_retries(monkeypatch, s3_server, flaky_proxy, rule):
    monkeypatch.setattr("pipeline.images.retry.BASE_S", 0.005)
    url = s3_server.put(s3_server.make_bucket(), "a.png", picture())
    proxy = flaky_proxy(s3_server, [rule])
    more = {**proxy.server.storage_options, "requester_pays": True}
    (row,) = decode_all(manifest_of([url]), storage_options=more, fetch=FetchSpec(attempts=3)).to_pylist()
    assert (row["stage"], row["attempts"], row["retryable"]) == ("fetch", 3, True)
    assert proxy.control.requests() == 3
