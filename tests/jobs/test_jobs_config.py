"""A config file in a bucket, where the files of a submitted job are."""

import json
from typing import Any

import fsspec
import pytest
from support.s3 import S3Server

from jobs.cli import run_command
from schemas.spec import JobSpec, build_spec


def test_a_config_file_may_lie_in_a_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url, options = f"s3://{s3_server.make_bucket()}/jobs/night.toml", s3_server.storage_options
    with fsspec.open(url, "wb", **options) as file:
        file.write('sources = "s3://b/é"\nbackend = "null"\nout = "o"\nlimit = 3\n'.encode())
    asked: list[JobSpec] = []
    monkeypatch.setattr("jobs.run.run_job", lambda values, **_: asked.append(build_spec(values)) or 0)
    given = ["--storage-options", json.dumps({"s3": options})]
    assert run_command(["embed", "--config", url, "--limit", "4", *given]) == 0
    (spec,) = asked
    assert (spec.sources, spec.out, spec.limit) == (("s3://b/é",), "o", 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "night.toml: cannot be read (no such file). The store's options and credentials are those"),
        (b"model = ", "night.toml is not TOML: "),
        (b"model = '\xff'", "night.toml is not TOML, which is text in UTF-8"),
        (b"modle = 'x'", "did you mean `model`?"),
    ],
)
def test_one_that_is_wrong_is_one_message(
    s3_server: S3Server, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    url, options = f"s3://{s3_server.make_bucket()}/jobs/night.toml", s3_server.storage_options
    if content is not None:
        with fsspec.open(url, "wb", **options) as file:
            file.write(content)
    place: dict[str, Any] = {"s3": options}
    assert run_command(["embed", "in", "--out", "o", "--config", url, "--storage-options", json.dumps(place)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
