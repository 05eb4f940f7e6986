"""What a spec refuses, in words that may be printed: the value at fault is told, a credential never."""

from typing import Any

import pytest

from schemas.errors import SpecError
from schemas.spec import build_spec

GOOD: dict[str, Any] = {"sources": ["a.jpg"], "model": "m", "out": "o", "storage_options": {"key": "AKIA-hidden"}}
HEADERS = {"authorization": "Bearer hidden"}


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as error:
        build_spec({**GOOD, **values})
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"features": []}, "neither features nor labels are asked for"),
        ({"backend": "triton"}, "backend triton needs --triton-url"),
        ({"triton": {"headers": HEADERS}}, "triton.url: Field required"),
        ({"triton": {"url": "grpc://h:1", "headers": "Bearer hidden"}}, "triton.headers: "),
        ({"triton": {"url": "grpc://h:1", "headers": {"authorization": ["Bearer hidden"]}}}, "triton.headers."),
        ({"triton": {"url": "grpc://h:1", "headers": {"x-key": 815}}}, "triton.headers.x-key: "),
        ({"triton": "authorization: Bearer hidden"}, "triton: "),
        ({"storage_options": '{"key": "hidden"}'}, "storage_options: "),
        ({"sources": "s3://b/?X-Amz-Signature=hidden&page=2"}, "(given: 's3://b/?X-Amz-Signature=…&page=2')"),
        ({"sources": [1, "https://me:hidden@host/a.jpg"], "out": None}, "sources.0: "),
        ({"model": {"key": "hidden"}}, "model: "),
        ({"shard": {"index": 4, "count": 4}}, "shards count from 0 to 3"),
    ],
)
def test_no_credential_is_told(values: dict[str, Any], message: str) -> None:
    shown = refused(values)
    assert message in shown
    assert "hidden" not in shown
    assert "815" not in shown


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "int3"}, "(given: 'int3')"),
        ({"features": ["cls", "clz"]}, "features.1: "),
        ({"features": ["cls", "clz"]}, "(given: 'clz')"),
        ({"fetch": {"attempts": 0}}, "fetch.attempts: Input should be greater than or equal to 1 (given: 0)"),
        ({"triton": {"url": "grpc://h:1", "outage_s": -1.5}}, "(given: -1.5)"),
        ({"out": None}, "(given: None)"),
        ({"triton": {"urll": "grpc://h:1"}}, "unknown key `triton.urll` in the spec; did you mean `url`?"),
    ],
)
def test_the_value_at_fault_is_told(values: dict[str, Any], message: str) -> None:
    assert message in refused(values)
