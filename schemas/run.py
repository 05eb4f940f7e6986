"""`run.json`: what a directory holds and where it comes from.

Written once the manifest is frozen, so its presence is what makes a manifest count. It never holds credentials:
sources are redacted and storage options are not part of it.
"""

import json
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from schemas.preprocessing import Preprocessing
from schemas.tables import SCHEMA_VERSION, FeatureSize, images_schema, output_fields

_SHOWN = 200


class ModelRecord(BaseModel):
    """The checkpoint, and what this run computes with it. `label_digest` is the SHA-256 of a `--label-file`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    revision: str | None = None
    family: str
    architecture: str
    digest: str
    dtype: str
    hidden_size: int
    num_labels: int
    pooled: str
    multi_label: bool = False
    zero_shot: str | None = None  # digest of labels, templates and vocabulary, where the labels are the user's words
    head: str | None = None  # digest of the user's own classifier
    preprocessing: Preprocessing
    label_digest: str | None = None


class AppliedHead(BaseModel):
    """A probe that `apply` labelled the rows of run `run_id` with: its name there, the SHA-256 of its file, the feature
    that it reads, and the run that it was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe: str
    digest: str
    feature: str
    trained_on: str
    run_id: str


class RunRecord(BaseModel):
    """The content of `run.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    run_id: str
    created: str
    spec: dict[str, Any]
    model: ModelRecord
    feature_dims: dict[str, FeatureSize] = {}
    versions: dict[str, str]
    manifest_rows: int
    manifest_parts: list[str]
    base_parts: int = 0  # the first so many parts are the first freeze; `--update` added the others
    applied: AppliedHead | None = None  # where the labels come from, if no image was read for them

    def images_schema(self, user: list[pa.Field]) -> pa.Schema:
        """The schema of a part of `images/`; `user` are the fields of the manifest that are the user's own."""
        has_labels = self.spec["labels"] > 0 and self.model.num_labels > 0
        return images_schema(output_fields(self.feature_dims, self.spec["feature_dtype"], has_labels), user)

    def part_metadata(self) -> bytes:
        """JSON for the Parquet metadata of a part, so that a part found alone says what it is."""
        content = {
            "schema_version": self.schema_version,
            "run_id": self.run_id,
            "created": self.created,
            "spec": self.spec,
            "model": self.model.model_dump(mode="json"),
            "versions": self.versions,
        }
        if self.applied:
            content["applied"] = self.applied.model_dump(mode="json")
        return json.dumps(content, sort_keys=True).encode()

    def describes(self, metadata: bytes | None) -> bool:
        """Whether the metadata of a part is that of this run, also if an earlier version wrote it."""
        try:
            there = json.loads(metadata or b"")
            there["model"] = part_model(there)
        except (ValueError, KeyError, TypeError):
            return False
        return not difference(there, json.loads(self.part_metadata()))


def part_model(content: dict[str, Any]) -> dict[str, Any]:
    """The model in the metadata of a part; what the version that wrote it did not know has its default.

    Raises KeyError or ValueError (of which pydantic's ValidationError is one) where there is none.
    """
    return ModelRecord.model_validate(content["model"]).model_dump(mode="json")


def difference(recorded: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: there … → now …` for every leaf that differs between two JSON-like dicts."""
    lines = []
    for key in sorted(recorded.keys() | wanted.keys()):
        old, new = recorded.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += difference(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: there {_shown(old)} → now {_shown(new)}")
    return lines


def _shown(value: Any) -> str:
    """JSON, cut where it is long: a list of labels may have thousands."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(value):,} in all)"
