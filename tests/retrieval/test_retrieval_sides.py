"""A probe that is tested on the rows that a column of the run's own marks."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from support.runs import RunContent, clustered, write_run

from jobs import retrieve_labels
from pipeline.retrieval.arrays import no_progress
from pipeline.retrieval.duplicates import same_bytes
from pipeline.retrieval.labels import labels_from_column, locate
from pipeline.retrieval.probe import evaluate, run_probe
from pipeline.retrieval.sides import split_by_column
from pipeline.retrieval.store import FeatureStore
from schemas.errors import SpecError

COUNT = 120
KINDS = [f"kind {row % 3}" for row in range(COUNT)]
MARKS = ["train", "train", "train", "test", "train", "Validation ", "train", None, "val", ""] * 12
TESTED = [row for row in range(COUNT) if row % 10 in (3, 5, 8)]


def open_run(folder: Path, marks: Sequence[str | None], copies: Mapping[int, int] = {}) -> FeatureStore:
    """Row `a` has the bytes of row `b` for each `a: b` of `copies`."""
    vectors = clustered(len(marks), 8, 3)
    vectors[0] = np.nan
    digests = [f"{copies.get(row, row):064x}" for row in range(len(marks))]
    user = {"kind": KINDS, "part": marks, "mark": marks}
    content = RunContent({"cls": vectors}, user=user, sha256=digests, parts=3)
    return FeatureStore.open(str(write_run(folder, content)))


def test_marked_rows_are_tested_and_no_others(tmp_path: Path) -> None:
    store = open_run(tmp_path, MARKS)
    matrix = store.load("cls")
    labelled = locate(matrix, labels_from_column(store, "kind"))
    sides = split_by_column(store, matrix, labelled, "mark")
    assert matrix.rows[sides.test.positions].tolist() == TESTED
    assert matrix.rows[sides.rest.positions].tolist() == [row for row in range(1, COUNT) if row not in TESTED]
    assert sides.marks == {"test": 12, "validation": 12, "val": 12}
    result = run_probe(matrix, labelled, sides=sides, progress=no_progress)
    assert result.training_rows == len(sides.rest.codes)
    judged = evaluate(matrix, result.head, sides.test).scores(3)
    np.testing.assert_array_equal(result.test.confusion.toarray(), judged.confusion.toarray())


def test_the_probe_says_which_rows_it_is_tested_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = open_run(tmp_path, MARKS).root
    assert retrieve_labels.probe(directory, label_column="kind", split_column="part") == 0
    assert "\n36 test rows by the column part (12 test, 12 validation, 12 val), 3 classes" in capsys.readouterr().out
    assert retrieve_labels.probe(directory, label_column="kind", split_column="part", as_json=True) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["split"] == {"column": "part", "test": {"test": 12, "validation": 12, "val": 12}, "left_out": 0}
    assert summary["linear"]["examples"] == 36
    assert summary == json.loads((tmp_path / "probes" / "main" / "probe.json").read_text())


@pytest.mark.timeout(120)
def test_a_picture_that_is_tested_is_not_learnt_from_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 6 and 9 are copies of a row that is tested, 23 is tested as its copy is, 31 has a copy that is learnt from too.
    copies = {6: 3, 9: 3, 23: 3, 31: 1}
    store = open_run(tmp_path, MARKS, copies)
    matrix = store.load("cls")
    labelled = locate(matrix, labels_from_column(store, "kind"), same_bytes(store))
    sides = split_by_column(store, matrix, labelled, "mark")
    assert matrix.rows[sides.test.positions].tolist() == TESTED
    assert matrix.rows[sides.rest.positions].tolist() == [
        row for row in range(1, COUNT) if row not in TESTED and row not in (6, 9)
    ]
    assert sides.left_out == 2
    assert retrieve_labels.probe(store.root, label_column="kind", split_column="part") == 0
    assert "\n2 rows to learn from are left out: they have the bytes of a test row\n" in capsys.readouterr().out
    summary = json.loads((tmp_path / "probes" / "main" / "probe.json").read_text())
    assert summary["split"]["left_out"] == 2
    assert summary["training_rows"] == len(sides.rest.codes)
    assert summary["linear"]["examples"] == 36


@pytest.mark.timeout(120)
def test_a_class_of_copies_of_test_rows_has_nothing_to_learn_from(tmp_path: Path) -> None:
    marks = ["train"] * COUNT
    marks[1] = "test"
    store = open_run(tmp_path, marks, dict.fromkeys(range(1, COUNT, 3), 1))
    matrix = store.load("cls")
    labelled = locate(matrix, labels_from_column(store, "kind"), same_bytes(store))
    message = "1 of 3 classes .* are marked test, or have the bytes of a row that is: `kind 1`"
    with pytest.raises(SpecError, match=message):
        split_by_column(store, matrix, labelled, "part")


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        (["train", "Dev"] * 60, "no labelled row .* marked test, val, valid, validation; the column says dev, train"),
        ([None] * COUNT, "no labelled row .* the column says nothing"),
        (["test"] * COUNT, "3 of 3 classes have no row to learn from, .* marked test: `kind 0`, `kind 1`, `kind 2`"),
        (["train", "val", "train"] * 40, "1 of 3 classes have no row to learn from, .* marked val: `kind 1`"),
    ],
)
def test_sides_that_cannot_be_used(tmp_path: Path, marks: list[str | None], message: str) -> None:
    store = open_run(tmp_path, marks)
    labelled = locate(store.load("cls"), labels_from_column(store, "kind"))
    with pytest.raises(SpecError, match=f"--split-column part: {message}"):
        split_by_column(store, store.load("cls"), labelled, "part")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("typo", "--split-column typo: images/ has the columns"),
        ("cls", "--split-column cls: holds fixed_size"),
    ],
)
def test_a_column_that_is_none_is_told_before_any_vector_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, message: str
) -> None:
    directory = open_run(tmp_path, MARKS).root
    monkeypatch.setattr(FeatureStore, "load", lambda *_: pytest.fail("read"))
    with pytest.raises(SpecError, match=message):
        retrieve_labels.probe(directory, label_column="kind", split_column=column)
