"""A trained head on disk: `DIR/probes/NAME/head.safetensors`, with where it comes from in its metadata.

Tensors: `weight` (C, D) and `bias` (C,), float32; logits = feature @ weight.T + bias, on features as a run writes them.
The metadata key `patchstream` holds the JSON of a `HeadRecord`.
"""

import hashlib
import json
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.addresses import join
from pipeline.retrieval.logistic import Linear
from pipeline.retrieval.output import check_name, list_folders
from pipeline.retrieval.store import FeatureStore
from pipeline.storage import Options, exists, filesystem, put_bytes, redact
from schemas.errors import OutputError
from schemas.run import ModelRecord

_KEY = "patchstream"


class HeadRecord(BaseModel):
    """Where a head comes from. `labels` are its classes in the order of the logits."""

    model_config = ConfigDict(extra="forbid")

    name: str
    feature: str
    dim: int
    labels: list[str]
    model: ModelRecord
    run_id: str
    label_source: str
    strength: float
    seed: int
    training_rows: int
    accuracy: float


def save_head(store: FeatureStore, folder: str, linear: Linear, record: HeadRecord) -> None:
    """Write `head.safetensors` into `folder`."""
    tensors = {"weight": np.ascontiguousarray(linear.weight), "bias": np.ascontiguousarray(linear.bias)}
    data = save(tensors, metadata={"format": "pt", _KEY: record.model_dump_json()})
    put_bytes(store.fs, join(folder, "head.safetensors"), data)


def load_head(store: FeatureStore, name: str) -> tuple[Linear, HeadRecord, str]:
    """The head NAME, its record and the SHA-256 of its file.

    Raises OutputError if there is none, it cannot be read, or it was trained on another model's features.
    """
    path = join(store.root, "probes", check_name(name), "head.safetensors")
    if not exists(store.fs, path):
        there = ", ".join(list_folders(store.fs, join(store.root, "probes"))) or "none"
        raise OutputError(
            f"no probe `{name}` under {redact(store.root)}/probes (there: {there}); run `patchstream probe`"
        )
    data = store.fs.cat_file(path)
    linear, record = parse_head(data, path)
    if (
        record.model.digest != store.record.model.digest
        or record.model.preprocessing != store.record.model.preprocessing
    ):
        raise OutputError(
            f"probe `{name}` was trained on vectors of {record.model.name} ({record.model.digest[:12]}), but this "
            f"run's are of {store.record.model.name} ({store.record.model.digest[:12]}): vectors of two models do not "
            "mix"
        )
    store.check_feature(record.feature)
    return linear, record, hashlib.sha256(data).hexdigest()


def read_head(place: str, storage_options: Options) -> tuple[Linear, HeadRecord, str]:
    """A head by its address: the folder `DIR/probes/NAME`, or the file in it. As `load_head`, for any model.

    Raises OutputError if there is none, or it cannot be read.
    """
    fs, path = filesystem(place, storage_options)
    path = path if path.endswith(".safetensors") else join(path, "head.safetensors")
    try:
        data = fs.cat_file(path)
    except (FileNotFoundError, IsADirectoryError):
        raise OutputError(
            f"no head at {redact(place)}; give a folder DIR/probes/NAME that `patchstream probe` made"
        ) from None
    return *parse_head(data, path), hashlib.sha256(data).hexdigest()


def parse_head(data: bytes, path: str) -> tuple[Linear, HeadRecord]:
    """Tensors and record of a head's file. Raises OutputError if it is none."""
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(data[8 : 8 + length])
        record = HeadRecord.model_validate_json(header.get("__metadata__", {}).get(_KEY, ""))
        linear = Linear(tensors["weight"].astype(np.float32), tensors["bias"].astype(np.float32))
    except (SafetensorError, ValidationError, KeyError, ValueError) as error:
        raise OutputError(f"{redact(path)} is not a head that `patchstream probe` saved: {error}") from None
    if linear.weight.shape != (len(record.labels), record.dim) or linear.bias.shape != (len(record.labels),):
        raise OutputError(f"{redact(path)}: weight {linear.weight.shape} does not fit {len(record.labels)} labels")
    return linear, record
