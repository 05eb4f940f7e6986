"""Probe and apply: as good as scikit-learn, honest numbers, a head that travels."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from sklearn.linear_model import LogisticRegression
from support.runs import RunContent, clustered, write_run

from jobs import retrieve_labels
from pipeline.maintenance import verify
from pipeline.retrieval.apply import apply_head
from pipeline.retrieval.arrays import no_progress
from pipeline.retrieval.head import HeadRecord, load_head, parse_head, save_head
from pipeline.retrieval.labels import Labelled, labels_from_column, locate, shots, split
from pipeline.retrieval.logistic import Linear, TrainingSet, fit_logistic
from pipeline.retrieval.probe import describe, evaluate, run_probe
from pipeline.retrieval.scores import calibration_error, score
from pipeline.retrieval.store import FeatureStore
from pipeline.sinks.compaction import compact
from schemas.errors import OutputError, SpecError

CLASSES = 8


def overlapping(count: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Classes that overlap, far from the origin and of odd scale, so that no classifier is perfect."""
    rng = np.random.default_rng(seed)
    middles = clustered(CLASSES, 24, CLASSES, seed=99, spread=0.0)[:CLASSES] + 0.35 * rng.standard_normal((CLASSES, 24))
    codes = rng.integers(0, CLASSES, count)
    vectors = 3 * (middles[codes] + 0.45 * rng.standard_normal((count, 24))) + 5
    return vectors.astype(np.float32), [f"class {code}" for code in codes]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    vectors, names = overlapping(3000)
    vectors[17] = np.nan
    content = RunContent({"cls": vectors}, user={"kind": names}, failed={}, parts=3)
    return FeatureStore.open(str(write_run(tmp_path_factory.mktemp("run"), content)))


@pytest.fixture(scope="module")
def labelled(store: FeatureStore) -> Labelled:
    return locate(store.load("cls"), labels_from_column(store, "kind"))


def test_accuracy_within_half_a_point_of_scikit_learn(store: FeatureStore, labelled: Labelled) -> None:
    matrix = store.load("cls")
    result = run_probe(matrix, labelled, few=(1, 5), seeds=3, progress=no_progress)
    # The probe draws its test rows first, from the same seed.
    rest, test = split(labelled, 0.2, np.random.default_rng(0))
    best = 0.0
    for strength in (0.001, 0.01, 0.1, 1.0):
        reference = LogisticRegression(C=strength, max_iter=2000)
        reference.fit(matrix.take(rest.positions), rest.codes)
        best = max(best, float(reference.score(matrix.take(test.positions), test.codes)))
    assert 0.6 < best < 0.999, "the data should be hard, or nothing is compared"
    assert result.test.accuracy >= best - 0.005
    assert result.knn.accuracy > 0.5
    assert result.few_shot[1][0] < result.few_shot[5][0] < result.test.accuracy + 0.02
    assert result.test.calibration_error < 0.08


def test_same_optimum_as_scikit_learn(store: FeatureStore, labelled: Labelled) -> None:
    data = TrainingSet(store.load("cls"), labelled)
    head = fit_logistic(data, 0.05)
    # C means what it means there for features divided by `scale`.
    scaled = (store.load("cls").take(labelled.positions) - data.mean) / data.scale
    reference = LogisticRegression(C=0.05, max_iter=5000, tol=1e-8).fit(scaled, labelled.codes)
    wanted = reference.predict_proba(scaled)
    np.testing.assert_allclose(head.probabilities(store.load("cls").take(labelled.positions)), wanted, atol=5e-3)


def test_too_many_shots_are_refused_before_anything_is_fitted(
    store: FeatureStore, labelled: Labelled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.retrieval.probe.fit_logistic", lambda *_: pytest.fail("fitted"))
    with pytest.raises(SpecError, match="--shots 2000: class"):
        run_probe(store.load("cls"), labelled, few=(1, 2000), progress=no_progress)


def test_streaming_gives_what_memory_gives(
    store: FeatureStore, labelled: Labelled, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = store.load("cls")
    whole = fit_logistic(TrainingSet(matrix, labelled), 0.1)
    monkeypatch.setattr("pipeline.retrieval.logistic._IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("pipeline.retrieval.matrix.CHUNK_BYTES", 4 * 24 * 500)
    pieces = fit_logistic(TrainingSet(matrix, labelled), 0.1)
    vectors = matrix.take(labelled.positions)
    np.testing.assert_allclose(pieces.probabilities(vectors), whole.probabilities(vectors), atol=2e-3)


def test_split_and_shots() -> None:
    codes = np.array([0] * 50 + [1] * 5 + [2])
    labelled = Labelled(np.arange(56), codes, ["a", "b", "c"])
    rest, test = split(labelled, 0.2, np.random.default_rng(0))
    assert np.bincount(test.codes, minlength=3).tolist() == [10, 1, 0]
    assert sorted([*rest.positions, *test.positions]) == list(range(56))
    with pytest.raises(SpecError, match="--shots 2: class `c` has 1 examples"):
        shots(labelled, 2, np.random.default_rng(0))
    assert np.bincount(shots(labelled, 1, np.random.default_rng(0)).codes).tolist() == [1, 1, 1]
    with pytest.raises(SpecError, match="every class has a single example"):
        split(Labelled(np.arange(2), np.arange(2), ["a", "b"]), 0.2, np.random.default_rng(0))


def test_scores_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], np.float32)
    found = score(probabilities, np.array([0, 0, 1, 1]))
    assert found.confusion.toarray().tolist() == [[2, 0], [1, 1]]
    summary = found.describe(["cat", "dog"])
    assert summary["accuracy"] == 0.75
    assert summary["classes"]["dog"] == {"accuracy": 0.5, "examples": 2}
    assert found.log_loss == pytest.approx(-np.log([0.9, 0.8, 0.7, 0.4]).mean(), rel=1e-5)
    # Four bins with one example each: |1−.9|, |1−.8|, |1−.7|, |0−.6|.
    assert found.calibration_error == pytest.approx((0.1 + 0.2 + 0.3 + 0.6) / 4, rel=1e-5)
    assert calibration_error(np.full(10, 0.5, np.float32), np.arange(10) < 5) == pytest.approx(0)


def save(store: FeatureStore, head: Linear, labels: list[str], name: str = "kinds") -> None:
    record = HeadRecord(
        name=name, feature="cls", dim=24, labels=labels, model=store.record.model, run_id=store.record.run_id,
        label_source="column kind", strength=0.1, seed=0, training_rows=10, accuracy=0.5,
    )  # fmt: skip
    save_head(store, f"{store.root}/probes/{name}", head, record)


def test_head_travels_with_its_provenance(store: FeatureStore, labelled: Labelled) -> None:
    head = fit_logistic(TrainingSet(store.load("cls"), labelled), 0.1)
    save(store, head, labelled.classes)
    loaded, record, _ = load_head(store, "kinds")
    np.testing.assert_array_equal(loaded.weight, head.weight)
    assert record.labels == labelled.classes
    with safe_open(f"{store.root}/probes/kinds/head.safetensors", "np") as file:
        assert json.loads(file.metadata()["patchstream"])["model"]["digest"] == store.record.model.digest
    with pytest.raises(OutputError, match=r"no probe `other` .*there: kinds"):
        load_head(store, "other")
    with pytest.raises(OutputError, match="not a head that"):
        parse_head(b"nonsense", "x.safetensors")


def test_apply_labels_every_row(store: FeatureStore, labelled: Labelled, tmp_path: Path) -> None:
    head = fit_logistic(TrainingSet(store.load("cls"), labelled), 0.1)
    save(store, head, labelled.classes, "apply")
    out = tmp_path / "out"
    summary = apply_head(store, "apply", str(out), top_k=3)
    assert summary["unlabelled"] == {"count": 1, "rows": [17]}
    table = pq.read_table(sorted((out / "images").glob("*.parquet")))
    assert "cls" not in table.schema.names
    assert table.column("kind").to_pylist() == store.table(["kind"]).column("kind").to_pylist()
    labels = table.column("labels").to_pylist()
    assert labels[17] is None
    probabilities = head.probabilities(store.load("cls").take(np.array([5, 2999])))
    for found, expected in zip((labels[5], labels[2999]), probabilities, strict=True):
        assert [item["index"] for item in found] == np.argsort(-expected)[:3].tolist()
        assert [item["score"] for item in found] == pytest.approx(np.sort(expected)[::-1][:3].tolist(), abs=1e-6)
        assert found[0]["label"] == labelled.classes[found[0]["index"]]
    assert not verify(str(out), {}).problems
    assert FeatureStore.open(str(out)).sql(
        "SELECT count(*) AS n FROM images WHERE labels[1].label = kind"
    ).to_pylist()[0]["n"] > 0.6 * 3000  # fmt: skip


def test_apply_resumes_and_refuses_another_directory(store: FeatureStore, labelled: Labelled, tmp_path: Path) -> None:
    save(store, Linear(np.ones((CLASSES, 24), np.float32), np.zeros(CLASSES, np.float32)), labelled.classes, "again")
    out = tmp_path / "out"
    apply_head(store, "again", str(out))
    parts = sorted((out / "images").glob("*.parquet"))
    stamps = {part: part.stat().st_mtime_ns for part in parts[1:]}
    parts[0].unlink()
    apply_head(store, "again", str(out))
    assert parts[0].exists()
    assert stamps == {part: part.stat().st_mtime_ns for part in parts[1:]}
    with pytest.raises(OutputError, match=r"holds another result:[\s\S]*labels"):
        apply_head(store, "again", str(out), top_k=2)
    with pytest.raises(OutputError, match="is not empty"):
        apply_head(store, "again", str(tmp_path))
    with pytest.raises(SpecError, match="--top-k 9: the head has 8 labels"):
        apply_head(store, "again", str(out), top_k=9)


def test_apply_follows_a_run_that_went_on(tmp_path: Path) -> None:
    vectors, names = overlapping(60)
    user, extra = {"kind": names}, np.zeros((60, 3), np.float16)
    failed = {3: "Timeout", 40: "NotFound"}
    done = np.array([row for row in range(60) if row not in failed])
    before = RunContent({"cls": vectors[done], "patches": extra[done]}, user=user, failed=failed, parts=3)
    run, out = write_run(tmp_path / "run", before), tmp_path / "out"
    head = Linear(np.ones((2, 24), np.float32), np.zeros(2, np.float32))
    save(FeatureStore.open(str(run)), head, ["a", "b"])
    apply_head(FeatureStore.open(str(run)), "kinds", str(out))
    pq.write_table(pa.table({"note": ["mine"]}), out / "images" / "notes.parquet")
    # What `retry` and the compaction at its end leave: the same rows in other parts, and fewer failures.
    for path in [*(run / "images").iterdir(), *(run / "failures").iterdir()]:
        path.unlink()
    after = RunContent(
        {"cls": np.delete(vectors, 40, 0), "patches": np.delete(extra, 40, 0)}, user=user, failed={40: "NotFound"}
    )
    write_run(run, after)
    compact(str(run), 1 << 30, {})
    apply_head(FeatureStore.open(str(run)), "kinds", str(out))
    assert (out / "images" / "notes.parquet").exists(), "only what apply wrote may go"
    (out / "images" / "notes.parquet").unlink()
    assert not verify(str(out), {}).problems
    found = FeatureStore.open(str(out))
    assert found.rows().tolist() == [row for row in range(60) if row != 40]
    assert found.dataset("failures").to_table().column("row").to_pylist() == [40]
    assert "patches" not in found.schema.names


def test_head_of_another_model_is_refused(store: FeatureStore, labelled: Labelled, tmp_path: Path) -> None:
    save(store, Linear(np.ones((CLASSES, 24), np.float32), np.zeros(CLASSES, np.float32)), labelled.classes, "mine")
    vectors, _ = overlapping(50)
    other = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": vectors}, digest="a" * 64))))
    (tmp_path / "probes" / "mine").mkdir(parents=True)
    data = Path(store.root, "probes", "mine", "head.safetensors").read_bytes()
    (tmp_path / "probes" / "mine" / "head.safetensors").write_bytes(data)
    with pytest.raises(OutputError, match="vectors of two models do not mix"):
        apply_head(other, "mine", str(tmp_path / "out"))


def test_summary_is_json(store: FeatureStore, labelled: Labelled) -> None:
    head = fit_logistic(TrainingSet(store.load("cls"), labelled), 0.1)
    assert evaluate(store.load("cls"), head, labelled).accuracy > 0.5
    small = Labelled(labelled.positions[:400], labelled.codes[:400], labelled.classes)
    result = run_probe(store.load("cls"), small, few=(2,), seeds=2, progress=no_progress)
    summary = json.loads(json.dumps(describe(result, small), allow_nan=False))
    assert summary["linear"]["examples"] == pytest.approx(80, abs=4)
    assert set(summary["few_shot"]) == {"2"}


def test_the_most_frequent_class_is_judged_on_the_test_rows(store: FeatureStore) -> None:
    # Of each class one is tested: 1 of 3, where 7 of 14 have the most frequent one.
    codes = np.repeat([0, 1, 2], [4, 7, 3])
    few = Labelled(np.arange(20, 34), codes, ["a", "b", "c"])
    result = run_probe(store.load("cls"), few, progress=no_progress)
    assert result.test.confusion.sum(axis=1).tolist() == [1, 1, 1]
    assert describe(result, few)["majority_accuracy"] == pytest.approx(1 / 3)


def test_the_probe_says_of_how_many_rows_each_number_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.retrieval.probe._KNN_ROWS", 30)
    names = [f"kind {row % 4}" for row in range(400)]
    run = write_run(tmp_path, RunContent({"cls": clustered(400, 16, 4)}, user={"kind": names}))
    assert retrieve_labels.probe(str(run), label_column="kind") == 0
    lines = capsys.readouterr().out.splitlines()
    (knn,) = (line for line in lines if line.startswith("k-NN"))
    assert knn.endswith(", of 30 test rows")
    assert any(line.startswith("80 test rows, 4 classes") for line in lines)
