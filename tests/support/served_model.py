"""A model that `export-triton` has written, and tables to compare the Triton predictor with torch on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from support.checkpoints import make_checkpoint

from pipeline.models import ModelInfo, inspect_model
from pipeline.predictors.batches import Wanted
from pipeline.predictors.torch_predictor import TorchPredictor
from pipeline.predictors.triton import TritonPredictor
from pipeline.predictors.triton_protocol import default_model_name
from pipeline.predictors.triton_repository import Serving, export_triton
from schemas.spec import TritonSpec
from schemas.tables import decoded_schema

SIDE = 32
MAX_BATCH = 8


class Exported(NamedTuple):
    info: ModelInfo
    wanted: Wanted
    repository: Path

    @property
    def name(self) -> str:
        return default_model_name(self.info)


def export(folder: Path, *, seed: int = 0) -> Exported:
    """A small ViT with weights drawn from `seed`, and its repository."""
    info = inspect_model(
        str(make_checkpoint(folder / "vit", "vit-classifier", image_size=SIDE, patch_size=8, seed=seed))
    )
    repository = folder / "repository"
    assert export_triton(info, str(repository), Serving(max_batch_size=MAX_BATCH), onnx=False) == [f"vit-{SIDE}x{SIDE}"]
    wanted = Wanted(("cls", "pooled"), (info.hidden_size, info.pooled_size), "float32", 5, info.labels, False)
    return Exported(info, wanted, repository)


@contextlib.contextmanager
def predicting(exported: Exported, spec: TritonSpec) -> Iterator[TritonPredictor]:
    predictor = TritonPredictor(exported.info, exported.wanted, "float32", spec)
    try:
        yield predictor
    finally:
        predictor.close()


def decoded(rows: int, *, seed: int = 0, broken: tuple[int, ...] = ()) -> pa.Table:
    """Random pixels; the rows in `broken` failed to decode."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, SIDE, SIDE, 3), dtype=np.uint8)
    values = {
        "row": list(range(rows)),
        "uri": [f"file:///{i}.png" for i in range(rows)],
        "pixels": [None if i in broken else pixels[i].tobytes() for i in range(rows)],
        "stage": ["decode" if i in broken else None for i in range(rows)],
        "error": ["Truncated" if i in broken else None for i in range(rows)],
        "retryable": [False if i in broken else None for i in range(rows)],
    }
    schema = decoded_schema([])
    return pa.table([pa.array(values.get(f.name, [None] * rows), f.type) for f in schema], schema=schema)


def with_torch(exported: Exported, table: pa.Table) -> pa.Table:
    return TorchPredictor(exported.info, exported.wanted, dtype="float32", batch_size=16, threads=1)(table)


def assert_same(got: pa.Table, expected: pa.Table) -> None:
    """Equal but for the time taken and for float32's last digits."""
    assert got.schema == expected.schema
    exact = [name for name in got.column_names if name not in ("cls", "pooled", "labels", "predict_s")]
    assert got.select(exact).equals(expected.select(exact))
    for name in ("cls", "pooled", "labels"):
        assert got[name].is_null().equals(expected[name].is_null())
    for name in ("cls", "pooled"):
        ours, theirs = (np.array(t[name].drop_null().to_pylist(), np.float32) for t in (got, expected))
        assert np.abs(ours - theirs).max() <= 1e-5
    for ours, theirs in zip(
        got["labels"].drop_null().to_pylist(), expected["labels"].drop_null().to_pylist(), strict=True
    ):
        assert [label["label"] for label in ours] == [label["label"] for label in theirs]
        assert [x["score"] for x in ours] == pytest.approx([x["score"] for x in theirs], abs=1e-5)
