"""A probe's head in place of the model's: `classify --head` says of pictures what `apply` says of their features."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import make_checkpoint
from support.commands import table

from cluster.session import ray_session
from jobs.cli import run_command
from jobs.demo.draw import write_pictures

MODEL = Path(__file__).parents[2] / "jobs" / "demo" / "model"
KINDS = ("circle", "ring", "square", "star", "triangle")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run over drawn pictures, and a probe on it that tells their shapes, whatever the colour."""
    folder = tmp_path_factory.mktemp("head")
    write_pictures(folder / "photos", 120, seed=8)
    with ray_session(cpus=2):
        job = [str(folder / "photos"), "--model", str(MODEL), "--dtype", "float32", "--no-report"]
        assert run_command(["embed", *job, "--labels", "1", "--out", str(folder / "run")]) == 0
        rows = table(folder / "run").to_pylist()
        with (folder / "labels.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "label"])
            writer.writerows([row["row"], row["labels"][0]["label"].split()[-1]] for row in rows)
        assert run_command(["probe", str(folder / "run"), "--labels", str(folder / "labels.csv")]) == 0
        yield folder


def test_as_apply_says(features: Path, tmp_path: Path) -> None:
    head = features / "run" / "probes" / "main"
    job = [str(features / "photos"), "--model", str(MODEL), "--dtype", "float32", "--features", "none", "--no-report"]
    assert run_command(["classify", *job, "--top-k", "5", "--head", str(head), "--out", str(tmp_path / "seen")]) == 0
    applied = ["apply", str(features / "run"), "--probe", "main", "--top-k", "5", "--out", str(tmp_path / "applied")]
    assert run_command(applied) == 0
    seen, read = table(tmp_path / "seen"), table(tmp_path / "applied")
    assert len(seen) == 120
    assert {label["label"] for labels in seen["labels"].to_pylist() for label in labels} == set(KINDS)
    for mine, theirs in zip(seen["labels"].to_pylist(), read["labels"].to_pylist(), strict=True):
        assert mine[0]["label"] == theirs[0]["label"]
        scores = [{label["label"]: label["score"] for label in labels} for labels in (mine, theirs)]
        np.testing.assert_allclose([scores[0][k] for k in KINDS], [scores[1][k] for k in KINDS], atol=1e-4)
    record = json.loads((tmp_path / "seen" / "run.json").read_text())
    assert record["model"]["head"]
    assert record["model"]["num_labels"] == len(KINDS)


def test_another_models_head_is_refused(features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_checkpoint(tmp_path / "other", "vit-classifier")
    head = features / "run" / "probes" / "main"
    job = [str(features / "photos"), "--model", str(other), "--out", str(tmp_path / "out")]
    assert run_command(["classify", *job, "--head", str(head)]) == 2
    assert "give the model and image size that it was trained on" in capsys.readouterr().err
    assert run_command(["classify", *job, "--head", str(tmp_path)]) == 2
    assert "no head at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
