"""What `retry` asks for again is what the directory holds; where it cannot be had, the failures stay as they are."""

import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from support.checkpoints import make_checkpoint

from pipeline.maintenance import reopen_failures, status
from pipeline.opening import Opened, ask, open_directory
from pipeline.sinks.parts import write_part
from schemas.errors import CheckpointError, OutputError, PatchstreamError, SpecError
from schemas.spec import build_spec
from schemas.tables import FAILURES_SCHEMA

COMMIT = "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3"
NAME = "somebody/vit"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on this machine, with one commit of one model in it."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    model = cache / "models--somebody--vit"
    make_checkpoint(model / "snapshots" / COMMIT, "vit", image_size=32, hidden_size=32, num_attention_heads=2)
    for branch in ("main", "v1"):
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / branch).write_text(COMMIT)
    return model


def failed_run(tmp_path: Path, **values: Any) -> Opened:
    """A run whose one picture failed, as the first attempt leaves it."""
    picture = tmp_path / "a.jpg"
    picture.write_bytes(b"no picture")
    spec = build_spec({"sources": [str(picture)], "model": NAME, "out": str(tmp_path / "out"), **values})
    opened = open_directory(ask(spec))
    row = {"row": 0, "uri": str(picture), "stage": "fetch", "error": "TimedOut", "message": "", "attempts": 4}
    table = pa.Table.from_pylist([{**row, "retryable": True}], FAILURES_SCHEMA)
    write_part(fsspec.filesystem("file"), spec.out, "failures", table, opened.record.part_metadata())
    return opened


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_a_hub_model_is_tried_again_at_its_commit(tmp_path: Path, hub: Path, revision: str | None) -> None:
    opened = failed_run(tmp_path, revision=revision)
    assert opened.record.model.revision == COMMIT
    count, values = reopen_failures(str(tmp_path / "out"), False, {})
    assert (count, values["revision"]) == (1, COMMIT)
    assert open_directory(ask(build_spec(values))).record == opened.record
    assert status(str(tmp_path / "out"), {})["pending"] == 1


@pytest.mark.parametrize(
    ("change", "placement", "error"),
    [
        ("gone", {}, CheckpointError),
        ("another", {}, OutputError),
        ("none", {"gpus_per_actor": -1}, SpecError),
    ],
)
def test_a_refusal_leaves_the_failures_where_they_are(
    tmp_path: Path, hub: Path, change: str, placement: dict[str, Any], error: type[PatchstreamError]
) -> None:
    failed_run(tmp_path)
    snapshot = hub / "snapshots" / COMMIT
    if change == "gone":
        shutil.rmtree(snapshot)
    elif change == "another":
        make_checkpoint(snapshot, "vit", image_size=32, hidden_size=32, num_attention_heads=2, num_hidden_layers=2)
    with pytest.raises(error):
        reopen_failures(str(tmp_path / "out"), False, {}, placement)
    assert status(str(tmp_path / "out"), {})["failures"] == 1


def test_damaged_failures_are_named(tmp_path: Path, hub: Path) -> None:
    failed_run(tmp_path)
    out = str(tmp_path / "out")
    (part,) = (tmp_path / "out" / "failures").iterdir()
    os.truncate(part, 500)
    for look in (lambda: status(out, {}), lambda: reopen_failures(out, False, {})):
        with pytest.raises(OutputError, match=f"{part} cannot be read"):
            look()
