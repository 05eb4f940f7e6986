"""What a spec refuses, in words that may be printed: the value at fault is told, a credential never."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import SpecError
from schemas.spec import FetchSpec, JobSpec, SinkSpec, TritonSpec, build_spec

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
        ({"batch_size": 0}, "batch_size: Input should be greater than or equal to 1 (given: 0)"),
        ({"image_size": 0}, "image_size: expected a list (given: 0)"),
        ({"triton": {"urll": "grpc://h:1"}}, "unknown key `triton.urll` in the spec; did you mean `url`?"),
        ({"max_pixels": 4}, "unknown key `max_pixels` in the spec; did you mean `fetch.max_pixels`?"),
        ({"timeout": 4}, "unknown key `timeout` in the spec; did you mean `fetch.timeout_s`?"),
        ({"triton_url": "x"}, "unknown key `triton_url` in the spec; did you mean `triton.url`?"),
        ({"commit_s": 4}, "unknown key `commit_s` in the spec; did you mean `sink.commit_s`?"),
        ({"fetch": 4}, "fetch: expected a table with some of the keys attempts, concurrency, max_bytes,"),
        ({"sources": 4}, "sources: expected a list (given: 4)"),
        ({"actors": "4:1"}, "actors: MAX 1 is below MIN 4 (given: '4:1')"),
        ({"actors": "some"}, "actors: expected N or MIN:MAX with 1 <= MIN <= MAX (given: 'some')"),
        ({"shard": "4/4"}, "shards count from 0 to 3 (given: '4/4')"),
        ({"shard": "4"}, "shard: expected I/N with 0 <= I < N, such as 0/4 (given: '4')"),
        ({"features": "cls,clz"}, "(given: 'clz')"),
    ],
)
def test_the_value_at_fault_is_told(values: dict[str, Any], message: str) -> None:
    assert message in refused(values)


@pytest.mark.parametrize("source", ["", " ", "file://", "s3://"])
def test_an_unset_variable_is_no_source(source: str) -> None:
    assert "a source is empty: a variable may be unset" in refused({"sources": ["a.jpg", source]})


def test_an_actor_has_no_gpus_that_it_does_not_use() -> None:
    for gpus in (1.5, 2, float("inf")):
        assert f"--gpus-per-actor {gpus:g}: an actor computes on one GPU" in refused({"gpus_per_actor": gpus})
    assert [build_spec({**GOOD, "gpus_per_actor": gpus}).gpus_per_actor for gpus in (0, 0.3, 1)] == [0, 0.3, 1]


@pytest.mark.parametrize(
    ("spelled", "plain"),
    [
        ({"actors": 4}, {"actors": {"min": 4, "max": 4}}),
        ({"actors": "1:4"}, {"actors": {"min": 1, "max": 4}}),
        ({"shard": "0/4"}, {"shard": {"index": 0, "count": 4}}),
        ({"features": "cls,pooled"}, {"features": ["cls", "pooled"]}),
        ({"features": "none", "labels": 1}, {"features": [], "labels": 1}),
    ],
)
def test_values_are_spelled_as_for_the_options(spelled: dict[str, Any], plain: dict[str, Any]) -> None:
    assert build_spec({**GOOD, **spelled}) == build_spec({**GOOD, **plain})


def test_the_page_of_the_keys_has_them_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "config.md").read_text()
    told = set(re.findall(r"`([a-z_.]+)`", "".join(re.findall(r"^\|(.*?)\|", page, re.MULTILINE))))
    tables = {"fetch": FetchSpec, "sink": SinkSpec, "triton": TritonSpec}
    below = {f"{name}.{key}" for name, table in tables.items() for key in table.model_fields}
    assert told == (set(JobSpec.model_fields) - set(tables)) | below
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert build_spec(tomllib.loads(example)).fetch.max_pixels == 400_000_000
