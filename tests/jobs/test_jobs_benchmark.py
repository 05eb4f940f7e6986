"""`patchstream benchmark` on the three kinds of input: every stage has a cost, the parts fit together."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support.checkpoints import make_checkpoint
from support.commands import patchstream
from support.s3 import S3Server

from jobs.demo.draw import write_pictures

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "vit", "vit-classifier")


def look(source: str, model: Path, *more: str, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    arguments = ("--model", model, "--seconds", "5", "--labels", "2", "--json", *more)
    done = patchstream("benchmark", source, *arguments, env=env)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert list(found["stages"]) == ["fetch", "decode", "transfer", "forward", "write"]
    assert all(stage["core_ms"] > 0 for name, stage in found["stages"].items() if name != "transfer")
    assert found["predicted_images_per_s"] > 0
    assert found["bottleneck"] in found["stages"]
    assert found["advice"]
    return found


def test_small_and_large_pictures(tmp_path: Path, model: Path) -> None:
    from PIL import Image

    write_pictures(tmp_path / "small", 12, seed=3)
    (tmp_path / "small" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    small = look(str(tmp_path / "small"), model)
    assert small["measured"]["failed"] == 1
    (tmp_path / "large").mkdir()
    for file in sorted((tmp_path / "small").iterdir())[:2]:
        if file.name != "broken.jpg":
            with Image.open(file) as image:
                image.convert("RGB").resize((2000, 1500)).save(tmp_path / "large" / f"{file.stem}.jpg")
    large = look(str(tmp_path / "large"), model)
    assert large["stages"]["decode"]["core_ms"] > 3 * small["stages"]["decode"]["core_ms"]
    assert large["bottleneck"] == "decode"
    fast = [sentence for sentence in large["advice"] if "--decode fast" in sentence]
    assert len(fast) == 1
    assert "cosine" in fast[0]


def test_shards_on_s3(tmp_path: Path, model: Path, s3_server: S3Server) -> None:
    write_pictures(tmp_path, 8, seed=4)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for file in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
            tar.add(file, arcname=file.name)
    bucket = s3_server.make_bucket()
    s3_server.put(bucket, "shards/00000.tar", data.getvalue())
    import os

    scratch = ("--scratch", f"s3://{bucket}/scratch")
    found = look(f"s3://{bucket}/shards", model, *scratch, env={**os.environ, **s3_server.env})
    assert fsspec.filesystem("s3", **s3_server.storage_options).find(bucket) == [f"{bucket}/shards/00000.tar"]
    assert found["measured"]["listed"] == 8
    assert found["measured"]["failed"] == 0


def test_nothing_that_can_be_decoded_is_an_error(tmp_path: Path, model: Path) -> None:
    (tmp_path / "not.jpg").write_bytes(b"not a picture")
    done = patchstream("benchmark", tmp_path, "--model", model, "--seconds", "5")
    assert done.returncode == 2
    assert "none of 1 sampled images could be read and decoded" in done.stderr
    assert "Traceback" not in done.stderr
