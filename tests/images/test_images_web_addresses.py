"""Web addresses that are none, or are written in an unusual way."""

import pytest
from support.manifests import decode_all, manifest_of

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
