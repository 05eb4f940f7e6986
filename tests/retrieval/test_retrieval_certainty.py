"""How certain a probe's head says it is: as certain as the labelled rows allow, and no more."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.runs import RunContent, clustered, write_run

from pipeline.retrieval.apply import apply_head
from pipeline.retrieval.arrays import no_progress
from pipeline.retrieval.head import HeadRecord, save_head
from pipeline.retrieval.labels import Labelled
from pipeline.retrieval.logistic import Linear
from pipeline.retrieval.probe import run_probe
from pipeline.retrieval.store import FeatureStore

pytestmark = pytest.mark.timeout(120)

NAMES = ["a", "b", "c", "d"]


def store_of(folder: Path, vectors: np.ndarray) -> FeatureStore:
    return FeatureStore.open(str(write_run(folder, RunContent({"cls": vectors}))))


@pytest.mark.parametrize(("rows", "least"), [(40, 0.6), (400, 0.9)])
def test_a_head_that_is_always_right_is_as_certain_as_its_validation_rows_are_many(
    tmp_path: Path, rows: int, least: float
) -> None:
    codes = np.arange(rows) % 4
    vectors = np.eye(4, 16, dtype=np.float32)[codes]
    vectors += np.float32(0.02) * np.random.default_rng(0).standard_normal(vectors.shape, np.float32)
    matrix = store_of(tmp_path, vectors).load("cls")
    result = run_probe(matrix, Labelled(np.arange(rows), codes, NAMES), progress=no_progress)
    assert result.test.accuracy == 1
    # A fifth of four fifths chose the temperature: of n of which all are right, the next is with (n + 1) / (n + 2).
    doubt = 1 / (0.16 * rows + 2)
    probabilities = np.sort(result.head.probabilities(vectors), axis=1)
    assert least < probabilities[:, -1].mean() < 1 - doubt / 3
    assert probabilities[:, :-1].min() > 0, "those behind can be told apart"


def test_the_temperature_suits_a_head_that_is_trained_on_more_rows_than_chose_its_strength(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At one C a head is shrunken the less the more rows it is trained on: here 32 times as many.
    monkeypatch.setattr("pipeline.retrieval.probe._CHOOSING_ROWS", 200)
    rows = 8000
    codes = np.arange(rows) % 4
    noise = np.random.default_rng(0).standard_normal((rows, 64), np.float32)
    matrix = store_of(tmp_path, np.eye(4, 64, dtype=np.float32)[codes] + np.float32(0.4) * noise).load("cls")
    result = run_probe(matrix, Labelled(np.arange(rows), codes, NAMES), progress=no_progress)
    assert 0.8 < result.test.accuracy < 0.95, "the data should be hard, or there is nothing to be wrong about"
    assert result.test.calibration_error < 0.04


def test_labels_are_ranked_where_the_scores_of_all_but_the_first_are_zero(tmp_path: Path) -> None:
    store = store_of(tmp_path / "run", clustered(6, 4, 2))
    record = HeadRecord(
        name="main", feature="cls", dim=4, labels=NAMES, model=store.record.model, run_id=store.record.run_id,
        label_source="", strength=0.1, seed=0, training_rows=10, accuracy=0.5,
    )  # fmt: skip
    bias = np.array([-900, 0, -300, -600], np.float32)
    save_head(store, f"{store.root}/probes/main", Linear(np.zeros((4, 4), np.float32), bias), record)
    apply_head(store, "main", str(tmp_path / "out"), top_k=3)
    labels = pq.read_table(tmp_path / "out" / "images").column("labels").to_pylist()
    assert [[item["label"] for item in found] for found in labels] == [["b", "c", "d"]] * 6
    assert [[item["score"] for item in found] for found in labels] == [[1.0, 0.0, 0.0]] * 6
