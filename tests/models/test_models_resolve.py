"""Checkpoints behind an object store: fetched once, and again when they change."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import lit
from support.checkpoints import make_checkpoint
from support.http_server import HttpServer
from support.s3 import S3Server

from pipeline.models import inspect_model, load_model, load_text
from schemas.errors import CheckpointError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATCHSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_model_on_s3(tmp_path: Path, s3_server: S3Server, cache: Path) -> None:
    folder = make_checkpoint(tmp_path / "vit", "vit", image_size=32, hidden_size=32, num_attention_heads=2)
    bucket = s3_server.make_bucket()
    (folder / "README.md").write_text("not fetched")
    url = s3_server.upload(folder, bucket, "models/vit")
    info = inspect_model(url, storage_options=s3_server.storage_options)
    assert info.name == url
    assert Path(info.folder).is_relative_to(cache)
    assert sorted(path.name for path in Path(info.folder).iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    pixels = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    assert torch.equal(load_model(info)(pixels).pooled, load_model(inspect_model(str(folder)))(pixels).pooled)
    before = Path(info.folder).stat().st_mtime_ns
    assert inspect_model(url, storage_options=s3_server.storage_options) == info
    assert Path(info.folder).stat().st_mtime_ns == before

    tensors = load_file(folder / "model.safetensors")
    tensors["layernorm.bias"] += 1
    save_file(tensors, folder / "model.safetensors")
    s3_server.upload(folder, bucket, "models/vit")
    assert inspect_model(url, storage_options=s3_server.storage_options).digest != info.digest


def test_actor_elsewhere_fetches_for_itself(
    tmp_path: Path, s3_server: S3Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "vit", "vit", image_size=32, hidden_size=32, num_attention_heads=2)
    url = s3_server.upload(folder, s3_server.make_bucket(), "vit")
    info = inspect_model(url, storage_options=s3_server.storage_options)
    cache.rename(tmp_path / "another machine")
    load_model(info, storage_options=s3_server.storage_options)
    assert Path(info.folder).exists()


def test_nothing_there(s3_server: S3Server, cache: Path) -> None:
    bucket = s3_server.make_bucket()
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        inspect_model(f"s3://{bucket}/models/none", storage_options=s3_server.storage_options)
    with pytest.raises(CheckpointError, match=r"cannot be listed|no checkpoint there"):
        inspect_model("s3://no-such-bucket-anywhere/vit", storage_options=s3_server.storage_options)


@pytest.mark.parametrize("store", ["s3", "http"])
def test_single_npz_with_its_vocabulary(
    store: str, tmp_path: Path, s3_server: S3Server, http_server: Callable[..., HttpServer], cache: Path
) -> None:
    folder = tmp_path / "lit"
    folder.mkdir()
    np.savez(folder / "LiT-X.npz", **lit.random_pair("bert"))
    np.savez(folder / "LiT-Y.npz", **lit.random_pair("bert", projected=False))
    lit.write_words(folder / "LiT-X.txt")
    if store == "s3":
        prefix, options = s3_server.upload(folder, s3_server.make_bucket(), "lit"), s3_server.storage_options
    else:
        prefix, options = http_server(folder).url, {}
    info = inspect_model(f"{prefix}/LiT-X.npz", storage_options=options)
    assert Path(info.folder).is_relative_to(cache)
    assert sorted(path.name for path in Path(info.folder).iterdir()) == ["LiT-X.npz", "LiT-X.txt"]
    assert info.digest == inspect_model(str(folder / "LiT-X.npz")).digest
    assert load_text(info).embed(["a dog"]).shape == (1, lit.SHARED)
    with pytest.raises(CheckpointError, match=r"LiT-Z\.npz: no such file"):
        inspect_model(f"{prefix}/LiT-Z.npz", storage_options=options)
    with pytest.raises(CheckpointError, match=r"2 checkpoints there; name one, such as .*/LiT-X\.npz"):
        inspect_model(prefix, storage_options=options)
