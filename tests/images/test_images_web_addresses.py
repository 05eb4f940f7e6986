"""Addresses that are none, or are written in capitals."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.http_server import HttpServer
from support.manifests import decode_all, manifest_of
from support.s3 import S3Server
from support.shards import png, shades

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    "address",
    ["http://[abc/a.jpg", "http://localhost:99999/a.jpg", "http://localhost:port/a.jpg", "http://éé..com/x.jpg"],
)
def test_an_address_that_cannot_be_one_is_not_tried_again(address: str) -> None:
    (row,) = decode_all(manifest_of([address])).to_pylist()
    assert (row["stage"], row["error"], row["retryable"], row["attempts"]) == ("fetch", "BadAddress", False, 1)
    assert address in row["message"]
    assert row["message"].endswith("correct the address")


def test_a_malformed_address_shows_no_password() -> None:
    (row,) = decode_all(manifest_of(["http://me:hunter2@localhost:99999/a.jpg?X-Amz-Signature=0123abc"])).to_pylist()
    assert row["error"] == "BadAddress"
    assert "hunter2" not in row["message"]
    assert "0123abc" not in row["message"]


def test_a_scheme_in_capitals_is_the_same(
    tmp_path: Path, http_server: Callable[..., HttpServer], s3_server: S3Server
) -> None:
    (tmp_path / "A b.png").write_bytes(png(7))
    web = http_server(tmp_path).url_of("A b.png")
    stored = s3_server.put(s3_server.make_bucket(), "A b.png", png(8))
    addresses = [web.replace("http://", "HTTP://"), stored.replace("s3://", "S3://"), f"FILE://{tmp_path}/A b.png"]
    options = {"s3": s3_server.storage_options}
    table = decode_all(manifest_of(addresses), storage_options=options)
    assert table["error"].to_pylist() == [None] * 3
    assert shades(table) == [7, 8, 7]
    assert table["uri"].to_pylist() == addresses
