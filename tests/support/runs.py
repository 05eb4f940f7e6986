"""Directories as a run leaves them, written straight from arrays."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.sinks.parts import part_name
from schemas.preprocessing import Preprocessing
from schemas.run import ModelRecord, RunRecord
from schemas.tables import (
    FAILURES_SCHEMA,
    LABEL,
    METADATA_KEY,
    feature_field,
    images_schema,
    manifest_schema,
)


@dataclass
class RunContent:
    """What goes into a directory. `features` maps `cls` or `pooled` to (N, D); every list has one entry an image.

    `uris` lists all images of the manifest; `failed` maps row ids to error names, all other rows are in `images/`,
    in order. `user` are the user's own columns for all manifest rows.
    """

    features: Mapping[str, np.ndarray]
    uris: Sequence[str] | None = None
    labels: Sequence[Sequence[tuple[int, str, float]]] | None = None
    user: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    failed: Mapping[int, str] = field(default_factory=dict)
    sizes: Sequence[tuple[int, int]] | None = None
    sha256: Sequence[str] | None = None
    containers: Sequence[tuple[str | None, int | None, int | None]] | None = None
    etags: Sequence[str | None] | None = None
    replaces: Mapping[int, int] = field(default_factory=dict)
    image_column: str = "image"
    parts: int = 2
    row_group_rows: int = 50_000
    digest: str = "0" * 64
    model: ModelRecord | None = None

    @property
    def images(self) -> int:
        """Number of rows of `images/`."""
        return len(next(iter(self.features.values())))

    @property
    def manifest_rows(self) -> int:
        """Number of rows of the manifest."""
        return self.images + len(self.failed)


def write_run(directory: Path, content: RunContent) -> Path:
    """Write run.json, manifest/, images/ and failures/ under `directory`, and give it back."""
    for name in ("manifest", "images", "failures"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    record = run_record(content)
    uris = list(content.uris or [f"memory://photo-{row:07d}.jpg" for row in range(content.manifest_rows)])
    rows = np.array([row for row in range(content.manifest_rows) if row not in content.failed])
    _write_manifest(directory, content, uris)
    table = _images_table(content, uris, rows)
    metadata = {METADATA_KEY: record.part_metadata()}
    for chosen in np.array_split(np.arange(len(rows)), content.parts):
        part = table.slice(chosen[0], len(chosen)).replace_schema_metadata(metadata)
        path = directory / "images" / part_name(rows[chosen])
        pq.write_table(part, path, row_group_size=content.row_group_rows, compression="zstd")
    if content.failed:
        _write_failures(directory, content, uris)
    (directory / "run.json").write_text(record.model_dump_json(indent=2))
    return directory


def manifest_name(content: RunContent) -> str:
    """File name of the one part of the manifest."""
    return f"manifest-{0:012d}-{content.manifest_rows:012d}.parquet"


def run_record(content: RunContent) -> RunRecord:
    """The record that goes with `content`."""
    first = next(iter(content.features.values()))
    model = content.model or ModelRecord(
        name="vit-for-tests",
        family="vit",
        architecture="vit",
        digest=content.digest,
        dtype="float32",
        hidden_size=first.shape[1],
        num_labels=1000,
        pooled="mean",
        preprocessing=Preprocessing(resize=(224, 224)),
    )
    spec: dict[str, Any] = {
        "sources": ["memory://"],
        "model": "vit-for-tests",
        "features": list(content.features),
        "labels": 5 if content.labels else 0,
        "image_column": content.image_column,
        "feature_dtype": str(first.dtype),
    }
    run_id = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    return RunRecord(
        run_id=run_id,
        created="2026-01-01T00:00:00+00:00",
        spec=spec,
        model=model,
        versions={"patchstream": "0.1.0"},
        manifest_rows=content.manifest_rows,
        manifest_parts=[manifest_name(content)],
        base_parts=1,
        feature_dims={name: vectors.shape[1] for name, vectors in content.features.items()},
    )


def _user_arrays(content: RunContent) -> dict[str, pa.Array]:
    return {name: pa.array(list(values)) for name, values in content.user.items()}


def _write_manifest(directory: Path, content: RunContent, uris: list[str]) -> None:
    count = content.manifest_rows
    containers = list(content.containers or [(None, None, None)] * count)
    user = _user_arrays(content)
    schema = manifest_schema([pa.field(name, array.type) for name, array in user.items()])
    columns = {
        "row": pa.array(np.arange(count)),
        "uri": pa.array(uris),
        "container": pa.array([item[0] for item in containers], pa.string()),
        "offset": pa.array([item[1] for item in containers], pa.int64()),
        "length": pa.array([item[2] for item in containers], pa.int64()),
        "size": pa.nulls(count, pa.int64()),
        "etag": pa.array(content.etags or [None] * count, pa.string()),
        "replaces": pa.array([content.replaces.get(row) for row in range(count)], pa.int64()),
        **user,
    }
    table = pa.table([columns[name] for name in schema.names], schema=schema)
    pq.write_table(table, directory / "manifest" / manifest_name(content))


def _images_table(content: RunContent, uris: list[str], rows: np.ndarray) -> pa.Table:
    count = content.images
    columns: dict[str, Any] = {"row": pa.array(rows), "uri": pa.array([uris[row] for row in rows])}
    outputs = []
    for name, vectors in content.features.items():
        outputs.append(feature_field(name, vectors.shape[1], pa.from_numpy_dtype(vectors.dtype)))
        values = pa.array(np.ascontiguousarray(vectors).reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(values, type=outputs[-1].type)
    if content.labels is not None:
        outputs.append(pa.field("labels", pa.list_(LABEL)))
        keys = ("index", "label", "score")
        items = [[dict(zip(keys, label, strict=True)) for label in labels] for labels in content.labels]
        columns["labels"] = pa.array(items, outputs[-1].type)
    sizes = content.sizes or [(640, 480)] * count
    columns |= {
        "width": pa.array([size[0] for size in sizes], pa.int32()),
        "height": pa.array([size[1] for size in sizes], pa.int32()),
        "format": pa.array(["JPEG"] * count),
        "sha256": pa.array(content.sha256 or [hashlib.sha256(b"%d" % row).hexdigest() for row in rows]),
    }
    user = {name: array.take(pa.array(rows)) for name, array in _user_arrays(content).items()}
    columns |= user
    schema = images_schema(outputs, [pa.field(name, array.type) for name, array in user.items()])
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _write_failures(directory: Path, content: RunContent, uris: list[str]) -> None:
    items = [
        {
            "row": row,
            "uri": uris[row],
            "stage": "decode",
            "error": error,
            "message": f"{error} in {uris[row]}",
            "attempts": 1,
            "retryable": False,
        }
        for row, error in sorted(content.failed.items())
    ]
    table = pa.Table.from_pylist(items, FAILURES_SCHEMA)
    pq.write_table(table, directory / "failures" / part_name(np.array(sorted(content.failed))))


def clustered(count: int, dim: int, centres: int, seed: int = 0, spread: float = 0.35) -> np.ndarray:
    """(count, dim) float32: points around `centres` random directions, `spread` the noise's length to the centre's."""
    rng = np.random.default_rng(seed)
    middles = rng.standard_normal((centres, dim), dtype=np.float32)
    middles /= np.linalg.norm(middles, axis=1, keepdims=True)
    points = np.empty((count, dim), np.float32)
    scale = np.float32(spread / np.sqrt(dim))
    for start in range(0, count, 65_536):
        stop = min(count, start + 65_536)
        noise = rng.standard_normal((stop - start, dim), dtype=np.float32)
        points[start:stop] = middles[rng.integers(0, centres, stop - start)] + scale * noise
    return points


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (64, 48), quality: int = 90) -> bytes:
    """A small JPEG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG", quality=quality)
    return file.getvalue()
