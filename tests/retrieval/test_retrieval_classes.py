"""Probe and apply with many classes: memory does not grow with rows times classes."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array
from support.runs import RunContent, clustered, write_run

from pipeline.retrieval.apply import apply_head
from pipeline.retrieval.arrays import no_progress
from pipeline.retrieval.head import HeadRecord, save_head
from pipeline.retrieval.labels import Labelled, labels_from_column, locate
from pipeline.retrieval.logistic import Linear, TrainingSet
from pipeline.retrieval.plots import confusion
from pipeline.retrieval.probe import _sharpness, evaluate, run_probe
from pipeline.retrieval.scores import Judgement, Scores, score
from pipeline.retrieval.store import FeatureStore

ROWS, CLASSES, DIM = 8000, 1000, 8
CHUNK_BYTES = 1 << 20


def run_of(folder: Path, head: Linear) -> FeatureStore:
    vectors = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    store = FeatureStore.open(str(write_run(folder, RunContent({"cls": vectors}, parts=1))))
    record = HeadRecord(
        name="many", feature="cls", dim=DIM, labels=[f"class {code}" for code in range(CLASSES)], seed=0,
        model=store.record.model, run_id=store.record.run_id, label_source="column kind", strength=0.1,
        training_rows=10, accuracy=0.5,
    )  # fmt: skip
    save_head(store, f"{store.root}/probes/many", head, record)
    return store


def test_many_classes_take_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    head = Linear(rng.standard_normal((CLASSES, DIM)).astype(np.float32), np.zeros(CLASSES, np.float32))
    store = run_of(tmp_path / "run", head)
    matrix = store.load("cls")
    labelled = Labelled(np.arange(ROWS), rng.integers(0, CLASSES, ROWS), [f"class {code}" for code in range(CLASSES)])
    whole = score(head.probabilities(matrix.vectors), labelled.codes)
    monkeypatch.setattr("pipeline.retrieval.matrix.CHUNK_BYTES", CHUNK_BYTES)
    works = (
        lambda out: evaluate(matrix, head, labelled),
        lambda out: _sharpness(matrix, head, labelled),
        lambda out: apply_head(store, "many", str(tmp_path / out), top_k=2),
    )
    for work in works:
        work("first")  # also imports what is imported late, which takes megabytes of its own
    peaks = []
    tracemalloc.start()
    for work in works:
        tracemalloc.reset_peak()
        work("second")
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    # All probabilities at once would be 32 MB, and there are copies of them on the way.
    assert max(peaks) < 12 << 20, peaks
    data = TrainingSet(matrix, labelled)
    assert max(len(codes) for _, codes in data.chunks()) * CLASSES * 4 <= CHUNK_BYTES
    found = evaluate(matrix, head, labelled).scores(CLASSES)
    np.testing.assert_array_equal(found.confusion.toarray(), whole.confusion.toarray())
    assert (found.log_loss, found.calibration_error) == pytest.approx((whole.log_loss, whole.calibration_error))


def test_confusion_takes_room_for_the_pairs_that_occur() -> None:
    classes = 5000
    codes = np.repeat(np.arange(classes), 2)
    predicted = np.where(np.arange(2 * classes) % 8 == 1, (codes + 7) % classes, codes)
    certain = np.full(2 * classes, 0.9, np.float32)
    names = [f"class {code}" for code in range(classes)]
    tracemalloc.start()
    found = Judgement(codes, predicted, certain, certain).scores(classes)
    described = found.describe(names)
    chart = confusion(found.confusion, names, "Confusion")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20, "a table of all pairs has 200 MB"
    assert described["accuracy"] == 7 / 8
    assert described["classes"]["class 4"] == {"accuracy": 0.5, "examples": 2}
    assert "class 0 taken for class 7: 1" in chart
    assert "the 40 of 5000 classes with the most errors" in chart


def test_choosing_keeps_no_confusions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = RunContent({"cls": clustered(400, 16, 4)}, user={"kind": [f"kind {row % 4}" for row in range(400)]})
    store = FeatureStore.open(str(write_run(tmp_path, content)))
    labelled = locate(store.load("cls"), labels_from_column(store, "kind"))
    made: list[int] = []

    def counted(confusion: csr_array, error: float, log_loss: float) -> Scores:
        made.append(int(confusion.sum()))
        return Scores(confusion, error, log_loss)

    monkeypatch.setattr("pipeline.retrieval.scores.Scores", counted)
    result = run_probe(store.load("cls"), labelled, few=(2,), seeds=2, progress=no_progress)
    assert made == [int(result.knn.confusion.sum()), int(result.test.confusion.sum())]
