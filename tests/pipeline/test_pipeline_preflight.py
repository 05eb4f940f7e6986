"""The preflight's measurements on a few pictures: what it compares, what it counts, what it leaves out."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.checkpoints import make_checkpoint
from support.npz import mixer_arrays_of

from jobs.demo.draw import write_pictures
from pipeline.models.precision import Hardware
from pipeline.opening import ResolvedJob, resolve_job
from pipeline.predicting import place_job
from pipeline.preflight import Budget, measure_decode, measure_forward, measure_write, other_precisions
from pipeline.sinks.parts import split
from schemas.machines import Machines
from schemas.spec import build_spec
from schemas.tables import predicted_schema

MACHINES = Machines(1, 0, 1e9, 1, (1.0,))


def resolved(model: Path, **values: Any) -> ResolvedJob:
    return resolve_job(
        build_spec({"sources": ["x"], "model": str(model), "out": "memory://o", "batch_size": 2, **values})
    )


@pytest.fixture
def pixels() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    exact = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    return {"exact": exact, "fast": 255 - exact}


@pytest.mark.parametrize("features", [["cls"], []])
def test_vectors_are_compared_whatever_is_asked_for(
    tmp_path: Path, pixels: dict[str, Any], features: list[str]
) -> None:
    """The best scores of two pictures look alike whatever is on them."""
    model = make_checkpoint(tmp_path / "vit", "vit-classifier", image_size=32, hidden_size=64, num_attention_heads=2)
    job = resolved(model, features=features, labels=3)
    found, outputs, predict = measure_forward(job, place_job(job, MACHINES, 1000), pixels, Budget(0))
    assert outputs["exact"].shape == outputs["fast"].shape == (4, 64)
    assert len(found) == 1
    assert callable(predict)


@pytest.mark.parametrize(
    ("flags", "dtype", "others"),
    [
        ({"amx_bf16", "amx_int8"}, "bfloat16", ("int8",)),
        ({"amx_bf16"}, "float32", ("bfloat16",)),
        ({"avx512_vnni"}, "float32", ("int8",)),
        ({"avx2"}, "bfloat16", ("float32",)),
    ],
)
def test_precisions_that_may_be_faster_here(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], dtype: str, others: tuple[str, ...]
) -> None:
    """Who asked for bfloat16 where it is emulated is told of float32."""
    hardware = Hardware(frozenset(flags))
    monkeypatch.setattr("pipeline.models.precision.describe_hardware", lambda cuda: hardware)
    assert other_precisions(dtype, cuda=False) == others


def test_a_precision_that_the_model_does_not_run_in_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from timm.models.mlp_mixer import MlpMixer

    np.savez(
        tmp_path / "mixer.npz",
        **mixer_arrays_of(MlpMixer(img_size=32, patch_size=8, num_blocks=1, embed_dim=32).eval()),
    )
    monkeypatch.setattr("pipeline.preflight.other_precisions", lambda dtype, cuda: ("int8",))
    monkeypatch.setattr("pipeline.preflight.CPU_BATCHES", ())
    job = resolved(tmp_path / "mixer.npz", features=["pooled"])
    alike = np.zeros((2, 32, 32, 3), np.uint8)
    found, _, _ = measure_forward(job, place_job(job, MACHINES, 1000), {"exact": alike, "fast": alike}, Budget(600))
    assert [item.dtype for item in found] == [job.dtype]


def test_only_files_that_were_tried_count_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(tmp_path / "vit", "vit", image_size=32, hidden_size=64, num_attention_heads=2)
    (tmp_path / "pictures").mkdir()
    write_pictures(tmp_path / "pictures", 3, seed=0)
    good = [path.read_bytes() for path in sorted((tmp_path / "pictures").iterdir())]
    job = resolved(model)
    monkeypatch.setattr("pipeline.preflight.DECODE_S", 600.0)
    _, pixels, failed = measure_decode(job, [b"no picture", *good])
    assert (len(pixels["exact"]), failed) == (3, 1)
    monkeypatch.setattr("pipeline.preflight.DECODE_S", 0.0)
    _, pixels, failed = measure_decode(job, [b"no picture", *good])
    assert (len(pixels["exact"]), failed) == (1, 1)


def test_the_digest_is_part_of_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only decoding and digests move: two seconds and one."""
    model = make_checkpoint(tmp_path / "vit", "vit", image_size=32, hidden_size=64, num_attention_heads=2)
    clock = [0.0]

    def spend(seconds: float, result: Any) -> Any:
        clock[0] += seconds
        return result

    digests: list[bytes] = []

    def sha256(data: bytes) -> Any:
        digests.append(data)
        return spend(1.0, hashlib.sha256(data))

    monkeypatch.setattr("pipeline.preflight.decode_into", lambda *_: spend(2.0, None))
    monkeypatch.setattr("pipeline.preflight.hashlib", SimpleNamespace(sha256=sha256), raising=False)
    monkeypatch.setattr("pipeline.preflight.time", SimpleNamespace(thread_time=lambda: clock[0], monotonic=lambda: 0.0))
    seconds, _, failed = measure_decode(resolved(model), [b"one", b"other"])
    assert (seconds, failed) == ({"exact": 3.0, "fast": 3.0}, 0)
    assert digests == [b"one", b"one", b"other", b"other"]


@pytest.mark.parametrize(("part_bytes", "rows"), [(1 << 26, 3 * 16), (1 << 17, 15), (1, 1)])
def test_what_is_written_to_measure_it_is_no_more_than_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int, rows: int
) -> None:
    """A row of 64 patches of 64 numbers in float16: 8,192 bytes and some; those of large models have megabytes."""
    sizes = {"image_size": 64, "patch_size": 8, "hidden_size": 64, "num_attention_heads": 2}
    model = make_checkpoint(tmp_path / "vit", "vit", **sizes)
    job = resolved(model, features=["patches"], sink={"part_bytes": part_bytes})
    schema = predicted_schema(job.wanted.fields, [])
    patches = np.zeros((3, 64, 64), np.float16).tolist()
    values = {"row": range(3), "uri": ["a", "b", "c"], "patches": patches}
    predicted = pa.table({field.name: pa.array(values.get(field.name, [None] * 3), field.type) for field in schema})
    written: list[pa.Table] = []

    def noted(table: pa.Table, schema: pa.Schema) -> tuple[pa.Table, pa.Table]:
        images, failures = split(table, schema)
        written.append(images)
        return images, failures

    monkeypatch.setattr("pipeline.preflight.split", noted)
    assert measure_write(job, predicted) > 0
    (table,) = written
    assert len(table) == rows
    assert table.nbytes <= part_bytes or len(table) == 1


@pytest.mark.parametrize(("gpus", "asked", "told"), [(4, 0, True), (4, 1, False), (0, 0, False)])
def test_gpus_that_stand_by_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, gpus: int, asked: int, told: bool
) -> None:
    model = make_checkpoint(tmp_path / "vit", "vit-classifier", image_size=32, hidden_size=64, num_attention_heads=2)
    machines = MACHINES._replace(cpus=8, gpus=gpus, node_cpus=(8.0,))
    place_job(resolved(model, gpus_per_actor=asked, dtype="float32"), machines, 1000)
    assert ("none was asked for: --gpus-per-actor 1" in caplog.text) == told
