"""Credentials that a store refuses although the object is as good as ever."""

from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error
from support.faults import Rule
from support.manifests import decode_all, manifest_of
from support.shards import listed, make_tar, png, shades

from pipeline.images.verdict import judge
from schemas.spec import FetchSpec

NOT_RENEWED = [
    (400, "ExpiredToken"),
    (400, "InvalidToken"),
    (400, "TokenRefreshRequired"),
    (403, "RequestTimeTooSkewed"),
]


@pytest.mark.parametrize(("status", "code"), NOT_RENEWED)
def test_a_token_that_was_not_renewed_is_no_fault_of_the_object(s3_server, flaky_proxy, status, code):
    url = s3_server.put(s3_server.make_bucket(), "a.png", png(3))
    proxy = flaky_proxy(s3_server, [Rule("status", status=status, code=code)])
    (row,) = decode_all(manifest_of([url]), storage_options=proxy.server.storage_options).to_pylist()
    assert (row["error"], row["retryable"], row["attempts"]) == ("NoCredentials", True, 1)
    assert code in row["message"]
    proxy.control.set_rules()
    assert shades(decode_all(manifest_of([url]), storage_options=proxy.server.storage_options)) == [3]


@pytest.mark.parametrize("kind", ["object", "shard", "table"])
def test_a_token_that_google_refuses_is_no_fault_of_the_object(gcs_server, flaky_proxy, tmp_path, kind):
    make_tar(tmp_path / "shard", [png(3)])
    pq.write_table(pa.table({"image": [png(3)]}), tmp_path / "table")
    (tmp_path / "object").write_bytes(png(3))
    name = {"object": "a.png", "shard": "a.tar", "table": "a.parquet"}[kind]
    url = gcs_server.put(gcs_server.make_bucket(), name, (tmp_path / kind).read_bytes())
    manifest = listed(url, gcs_server.storage_options)
    proxy = flaky_proxy(gcs_server, [Rule("status", status=401)])
    fetched = partial(decode_all, manifest, storage_options=proxy.server.storage_options)
    (row,) = fetched(fetch=FetchSpec(attempts=2)).to_pylist()
    assert (row["error"], row["retryable"], row["attempts"]) == ("NoCredentials", True, 2)
    assert "401" in row["message"]
    proxy.control.set_rules(Rule("status", status=401, first=1))
    assert shades(fetched()) == [3]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("status", "code", "error", "retryable"),
    [
        *((status, code, "NoCredentials", True) for status, code in NOT_RENEWED),
        (400, "ExpiredTokenException", "NoCredentials", True),  # of the service that gives out tokens
        (400, "InvalidArgument", "Http400", False),
        (403, "AccessDenied", "Forbidden", False),
        (403, "SignatureDoesNotMatch", "Forbidden", False),
        (404, "NoSuchKey", "NotFound", False),
        (503, "SlowDown", "Throttled", True),
    ],
)
def test_what_s3_says_goes_before_its_status(status, code, error, retryable, wrapped):
    response = {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": status}}
    raised = ClientError(response, "GetObject")
    verdict = judge(translate_boto_error(raised) if wrapped else raised)
    assert (verdict.error, verdict.retryable) == (error, retryable)
