"""Checkpoints behind an object store: fetched once, and again when they change."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import lit
from support.checkpoints import make_checkpoint
from support.faults import Rule
from support.http_server import HttpServer
from support.s3 import S3Server

from pipeline.models import inspect_model, load_model, load_text
from pipeline.models.hub import SMALL_FILES
from pipeline.predictors.triton_repository import Serving, export_triton
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
    assert sorted(path.name for path in Path(info.folder).parent.iterdir()) == ["LiT-X.npz", "LiT-X.txt"]
    assert info.digest == inspect_model(str(folder / "LiT-X.npz")).digest
    assert load_text(info).embed(["a dog"]).shape == (1, lit.SHARED)
    with pytest.raises(CheckpointError, match=r"LiT-Z\.npz: no such file"):
        inspect_model(f"{prefix}/LiT-Z.npz", storage_options=options)
    with pytest.raises(CheckpointError, match=r"2 checkpoints there; name one, such as .*/LiT-X\.npz"):
        inspect_model(prefix, storage_options=options)


@pytest.mark.parametrize("words", ["LiT-X.txt", "vocab.txt", "spiece.model", "sentencepiece.model"])
@pytest.mark.parametrize("named", [True, False])
def test_a_vocabulary_is_fetched_with_its_npz(
    named: bool, words: str, tmp_path: Path, s3_server: S3Server, cache: Path
) -> None:
    """The file named, or the prefix that it is alone under."""
    folder = tmp_path / "lit"
    folder.mkdir()
    in_pieces = words.endswith(".model")
    write = lit.train_pieces if in_pieces else lit.write_words
    write(folder / words)
    arrays = lit.random_pair("transformer", vocabulary=64) if in_pieces else lit.random_pair("bert")
    np.savez(folder / "LiT-X.npz", **arrays)
    (folder / "LICENSE.txt").write_text("not fetched")
    url, options = s3_server.upload(folder, s3_server.make_bucket(), "lit"), s3_server.storage_options
    info = inspect_model(f"{url}/LiT-X.npz" if named else url, storage_options=options)
    assert {path.name for path in (cache / "models").glob("*/*")} == {"LiT-X.npz", words}
    expected = load_text(inspect_model(str(folder))).embed(["a dog"])
    np.testing.assert_array_equal(load_text(info).embed(["a dog"]), expected)


def test_a_file_that_changes_at_a_server_without_etags(tmp_path: Path, cache: Path) -> None:
    """Of the same size, so that its time alone tells."""
    archive = tmp_path / "www/LiT-X.npz"
    archive.parent.mkdir()
    lit.write_words(archive.with_suffix(".txt"))
    handler = partial(SimpleHTTPRequestHandler, directory=str(archive.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            digests = set()
            for seed in (0, 1):
                np.savez(archive, **{name: array + seed for name, array in lit.random_pair("bert").items()})
                os.utime(archive, (seed * 10, seed * 10))
                digests.add(inspect_model(f"http://127.0.0.1:{server.server_port}/LiT-X.npz").digest)
        finally:
            server.shutdown()
    assert len(digests) == 2


@pytest.mark.parametrize("dated", [True, False])
def test_a_folder_that_changes_on_a_web_server(dated: bool, tmp_path: Path, cache: Path) -> None:
    """Its listing tells names alone; where the files tell nothing more either, their content does."""

    class Handler(SimpleHTTPRequestHandler):
        def send_header(self, keyword: str, value: str) -> None:
            if dated or keyword != "Last-Modified":
                super().send_header(keyword, value)

    folder = make_checkpoint(tmp_path / "www/vit", "vit", image_size=32, hidden_size=32, num_attention_heads=2)
    tensors = load_file(folder / "model.safetensors")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder.parent))) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            for seed in (0, 1, 1):
                save_file({**tensors, "layernorm.bias": tensors["layernorm.bias"] + seed}, folder / "model.safetensors")
                os.utime(folder / "model.safetensors", (seed * 10, seed * 10))
                info = inspect_model(f"http://127.0.0.1:{server.server_port}/vit/")
                assert info.digest == inspect_model(str(folder)).digest
        finally:
            server.shutdown()
    assert len([path for path in (cache / "models").iterdir() if path.is_dir()]) == 2


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> None:
    monkeypatch.delenv("PATCHSTREAM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = make_checkpoint(tmp_path / "vit", "vit", image_size=32, hidden_size=32, num_attention_heads=2)
    url, options = s3_server.upload(folder, s3_server.make_bucket(), "vit"), s3_server.storage_options
    info = inspect_model(url, storage_options=options)
    assert Path(info.folder).parent == tmp_path / "xdg/patchstream/models"
    # Root may write anywhere, so what is read-only for others is stood in for by a folder where the lock would be.
    lock = Path(f"{info.folder}.lock")
    lock.unlink()
    lock.mkdir()
    assert inspect_model(url, storage_options=options) == info
    (tmp_path / "a file").touch()
    monkeypatch.setenv("PATCHSTREAM_CACHE", str(tmp_path / "a file"))
    with pytest.raises(CheckpointError, match=r"/vit: cannot be kept in .*/a file: .*PATCHSTREAM_CACHE"):
        inspect_model(url, storage_options=options)


FULL = """
import resource, signal, sys
from pipeline.models import inspect_model
from schemas.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    inspect_model(sys.argv[1])
except CheckpointError as error:
    print(error)
"""


def test_a_disk_without_room_for_a_checkpoint(
    tmp_path: Path, http_server: Callable[..., HttpServer], cache: Path
) -> None:
    folder = make_checkpoint(tmp_path / "vit", "vit", image_size=32, hidden_size=32, num_attention_heads=2)
    url = f"{http_server(folder).url}/model.safetensors"
    done = subprocess.run([sys.executable, "-c", FULL, url], capture_output=True, text=True, check=True, timeout=120)
    assert f"model.safetensors: cannot be kept in {cache}: File too large. Make room there" in done.stdout, done.stderr
    assert "PATCHSTREAM_CACHE" in done.stdout
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]
    inspect_model(url)


def test_weights_replaced_after_planning_are_refused(tmp_path: Path) -> None:
    """A training script writes its next ones over them, or each machine has a folder of its own."""
    folder = make_checkpoint(tmp_path / "vit", "vit", image_size=32, hidden_size=32, num_attention_heads=2)
    info = inspect_model(str(folder))
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "layernorm.bias": tensors["layernorm.bias"] + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"/vit has digest .* but the run was planned with"):
        load_model(info)


@pytest.mark.parametrize("name", ["mine.bin", "model.safetensors?download=true", "LiT-X.npz?X-Amz-Signature=abc"])
def test_the_address_of_a_file(name: str, tmp_path: Path, http_server: Callable[..., HttpServer], cache: Path) -> None:
    """Of any name, and with a query, such as the signature of a bucket's."""
    folder = make_checkpoint(tmp_path / "vit", "vit", image_size=32, hidden_size=32, num_attention_heads=2)
    torch.save(load_file(folder / "model.safetensors"), folder / "mine.bin")
    np.savez(folder / "LiT-X.npz", **lit.random_pair("bert"))
    info = inspect_model(f"{http_server(folder).url}/{name}")
    assert info.digest == inspect_model(str(folder / name.partition("?")[0])).digest
    assert "abc" not in info.name
    load_model(info)


def test_a_web_server_that_refuses_is_not_one_without_the_file(
    tmp_path: Path, http_server: Callable[..., HttpServer], cache: Path
) -> None:
    np.savez(tmp_path / "LiT-X.npz", **lit.random_pair("bert"))
    url = http_server(tmp_path, [Rule("status", status=403)]).url.replace("http://", "http://me:secret@")
    with pytest.raises(CheckpointError, match=r"LiT-X\.npz: cannot be read: .*403") as error:
        inspect_model(f"{url}/LiT-X.npz")
    assert "secret" not in str(error.value)


def test_a_weight_file_on_disk_with_its_config_beside_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "vit", "vit", image_size=32, hidden_size=32, num_attention_heads=2)
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    whole, file = inspect_model(str(folder)), inspect_model(str(folder / "model.safetensors"))
    assert (file.digest, file.preprocessing) == (whole.digest, whole.preprocessing)
    pixels = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    assert torch.equal(load_model(file)(pixels).pooled, load_model(whole)(pixels).pooled)
    assert inspect_model(str(folder / "other.safetensors")).digest != whole.digest
    (name,) = export_triton(file, str(tmp_path / "repository"), Serving(), onnx=False)
    assert inspect_model(str(tmp_path / "repository" / name / "1/checkpoint")).digest == whole.digest


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pth.tar", "other.safetensors"])
def test_what_loads_from_disk_loads_from_a_store(name: str, tmp_path: Path, s3_server: S3Server, cache: Path) -> None:
    """As a folder and as a single file. What a Trainer keeps beside the weights is not taken for them, nor fetched."""
    folder = make_checkpoint(tmp_path / "vit", "vit", image_size=32, hidden_size=32, num_attention_heads=2)
    if name.endswith(".safetensors"):
        (folder / "model.safetensors").rename(folder / name)
    else:
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    for left in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"x": torch.zeros(1)}, folder / left)
    url, options = s3_server.upload(folder, s3_server.make_bucket(), "vit"), s3_server.storage_options
    digest = inspect_model(str(folder)).digest
    for model in (folder.as_uri(), f"{folder.as_uri()}/{name}", url, f"{url}/{name}"):
        info = inspect_model(model, storage_options=options)
        assert info.digest == digest, model
        load_model(info)
    fetched = {path.name for path in (cache / "models").glob("*/*")}
    assert fetched == {"config.json", "preprocessor_config.json", name}


def test_an_adapter_is_no_model(tmp_path: Path, s3_server: S3Server, cache: Path) -> None:
    """As PEFT saves a LoRA: without the model that it was trained on, and without its config."""
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file({"base_model.model.vit.x.lora_A.weight": torch.zeros(4, 32)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "google/vit-base", "peft_type": "LORA"}')
    url = s3_server.upload(folder, s3_server.make_bucket(), "lora")
    for place in (str(folder), url):
        for model in (place, f"{place}/adapter_model.safetensors"):
            with pytest.raises(
                CheckpointError, match=r"an adapter for google/vit-base, not a model\..*merge_and_unload"
            ):
                inspect_model(model, storage_options=s3_server.storage_options)
    assert "adapter_config.json" in SMALL_FILES, "what is fetched of a hub name"
    # Beside the weights of the whole model it is in nobody's way.
    whole = make_checkpoint(tmp_path / "vit", "vit", image_size=32, hidden_size=32, num_attention_heads=2)
    (whole / "model.safetensors").rename(whole / "merged.safetensors")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).rename(whole / name)
    assert inspect_model(str(whole)).family == "vit"
