"""Labels for a probe: from a column, and from a CSV that names rows by number, address or file name."""

import json
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from support.runs import RunContent, clustered, write_run
from support.s3 import S3Server

from jobs import retrieve_labels
from pipeline.retrieval.duplicates import same_bytes
from pipeline.retrieval.labels import Labelled, labels_from_column, labels_from_csv, locate, shots, split
from pipeline.retrieval.store import FeatureStore
from schemas.errors import SpecError
from schemas.redaction import redact


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    vectors = clustered(60, 8, 3)
    vectors[17] = np.nan
    content = RunContent({"cls": vectors}, user={"kind": [f"class {row % 3}" for row in range(60)]}, parts=3)
    return FeatureStore.open(str(write_run(tmp_path_factory.mktemp("run"), content)))


def write_csv(path: Path, header: str, lines: Sequence[str]) -> str:
    path.write_text("\n".join([header, *lines]) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("header", "line"),
    [("row,label", "{row},{label}"), ("label,uri", "{label},memory://photo-{row:07d}.jpg"),
     ("name,label", "photo-{row:07d}.jpg,{label}")],
)  # fmt: skip
def test_labels_from_csv(store: FeatureStore, tmp_path: Path, header: str, line: str) -> None:
    labelled = locate(store.load("cls"), labels_from_column(store, "kind"))
    kinds = store.to_pandas(["row", "kind"])
    lines = [line.format(row=row, label=kind) for row, kind in zip(kinds["row"], kinds["kind"], strict=True)]
    given = labels_from_csv(store, write_csv(tmp_path / "l.csv", header, [*lines, "nowhere,class 1"]))
    assert len(given.unknown) == 1
    assert given.named == len(lines) + 1
    found = locate(store.load("cls"), given)
    np.testing.assert_array_equal(found.positions, labelled.positions)
    np.testing.assert_array_equal(found.codes, labelled.codes)
    assert 17 not in found.positions


def test_labels_from_a_pipe(store: FeatureStore, pipe: Callable[[bytes], str]) -> None:
    assert labels_from_csv(store, pipe(b"row,label\n3,a\n4,b\n")).rows.tolist() == [3, 4]


def test_an_address_goes_before_a_row_number_of_another_table(store: FeatureStore, tmp_path: Path) -> None:
    lines = [f"{row + 5},memory://photo-{row:07d}.jpg,class {row % 2}" for row in range(20, 30)]
    found = labels_from_csv(store, write_csv(tmp_path / "l.csv", "row,uri,label", lines))
    assert found.rows.tolist() == list(range(20, 30))


def test_labels_of_signed_addresses(tmp_path: Path) -> None:
    signed = [f"https://h/x{row}.jpg?X-Amz-Signature=a/{row}" for row in range(4)] + ["https://h/one?id=4"]
    content = RunContent({"cls": clustered(5, 8, 2)}, uris=[redact(uri) for uri in signed])
    store = FeatureStore.open(str(write_run(tmp_path / "run", content)))
    lines = [f"{uri},{row % 2}" for row, uri in enumerate(signed)]
    found = labels_from_csv(store, write_csv(tmp_path / "uri.csv", "uri,label", lines))
    assert found.rows.tolist() == list(range(5))
    assert found.labels == ["0", "1", "0", "1", "0"]
    lines = [f"x{row}.jpg,{row % 2}" for row in range(4)] + ["one?id=4,0"]
    found = labels_from_csv(store, write_csv(tmp_path / "name.csv", "name,label", lines))
    assert found.rows.tolist() == list(range(5))


def test_labels_may_lie_in_a_bucket(store: FeatureStore, s3_server: S3Server) -> None:
    url, options = f"s3://{s3_server.make_bucket()}/labels.csv", s3_server.storage_options
    with pytest.raises(SpecError, match=r"--labels s3://.*/labels\.csv: no such file"):
        labels_from_csv(store, url, options)
    with fsspec.open(url, "wb", **options) as file:
        file.write('row,label\n0,"a\r\nb"\n1,é\n'.encode("utf-8-sig"))
    found = labels_from_csv(store, url, options)
    assert (found.source, list(found.labels)) == (url, ["a\r\nb", "é"])


@pytest.mark.parametrize(
    ("key", "name"), [("row", "7"), ("uri", "memory://photo-0000007.jpg"), ("name", "photo-0000007.jpg")]
)
def test_rows_that_a_file_does_not_name_take_no_memory(tmp_path: Path, key: str, name: str) -> None:
    content = RunContent({"cls": np.ones((20_000, 1), np.float32)}, parts=20)
    store = FeatureStore.open(str(write_run(tmp_path / "run", content)))
    path = write_csv(tmp_path / "l.csv", f"{key},label", [f"{name},a", "nowhere,b"])
    labels_from_csv(store, path)
    tracemalloc.start()
    try:
        assert labels_from_csv(store, path).rows.tolist() == [7]
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_labels_that_match_no_row_show_both_sides(store: FeatureStore, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "l.csv", "uri,label", [f"s3://b/{i}.jpg,{i % 2}" for i in range(9)])
    with pytest.raises(SpecError) as caught:
        labels_from_csv(store, path)
    message = str(caught.value)
    assert message.count("s3://b/") == 5
    assert message.count("memory://photo-") == 5


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        ("file,label", ["a,b"], "needs a column `label` and one of uri, row, name; it has file, label"),
        ("row,label,name", ["1,x,a"], "has both `row` and `name`.*leave one of them out"),
        ("row,label", ["1,x", "2,x"], "only the class `x`; a probe needs at least two"),
        ("row,label", ["17,x", "18,y"], "only the class `y`"),
    ],
)
def test_bad_label_files(store: FeatureStore, tmp_path: Path, header: str, lines: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        locate(store.load("cls"), labels_from_csv(store, write_csv(tmp_path / "l.csv", header, lines)))
    with pytest.raises(SpecError, match="no such file"):
        labels_from_csv(store, str(tmp_path / "none.csv"))
    with pytest.raises(SpecError, match=r"--labels .* cannot be read as a file \(Is a directory\); give a CSV file"):
        labels_from_csv(store, str(tmp_path))
    with pytest.raises(SpecError, match=r"--label-column colour: images/ has the columns row, uri, cls"):
        labels_from_column(store, "colour")
    with pytest.raises(
        SpecError, match=r"--label-column cls: holds fixed_size_list.*, which is no label; name a column"
    ):
        labels_from_column(store, "cls")


def test_empty_cells_are_no_class(tmp_path: Path) -> None:
    """As a CSV leaves them that is filled in for some of its rows."""
    vectors = clustered(6, 8, 2)
    content = RunContent({"cls": vectors}, user={"kind": ["a", "", "b", "  ", "b", None]})
    store = FeatureStore.open(str(write_run(tmp_path, content)))
    found = locate(store.load("cls"), labels_from_column(store, "kind"))
    assert (found.classes, found.positions.tolist()) == (["a", "b"], [0, 2, 4])


def test_label_column_that_differs_in_case_from_ours(tmp_path: Path) -> None:
    vectors = clustered(6, 8, 2)
    user = {"Width": ["wide", "wide", "narrow", None, "narrow", "wide"]}
    content = RunContent({"cls": vectors}, user=user, sizes=[(10 * row, 5) for row in range(6)])
    store = FeatureStore.open(str(write_run(tmp_path, content)))
    found = locate(store.load("cls"), labels_from_column(store, "Width"))
    assert found.classes == ["narrow", "wide"]
    assert found.positions.tolist() == [0, 1, 2, 4, 5]
    assert found.codes.tolist() == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("again", [False, True])
def test_a_name_of_several_pictures_is_refused(tmp_path: Path, again: bool) -> None:
    """Unless they are one picture, listed twice."""
    folders = ("cat", "cat") if again else ("cat", "dog")
    uris = [f"/data/{folder}/{number}.jpg" for folder in folders for number in range(4)]
    digests = [f"{row % 4 if again else row:064x}" for row in range(8)]
    run = write_run(tmp_path, RunContent({"cls": clustered(8, 8, 2)}, uris=uris, sha256=digests))
    path = write_csv(tmp_path / "l.csv", "name,label", ["1.jpg,a", "2.jpg,b"])
    if again:
        assert sorted(labels_from_csv(FeatureStore.open(str(run)), path).rows.tolist()) == [1, 2, 5, 6]
        return
    with pytest.raises(SpecError) as caught:
        labels_from_csv(FeatureStore.open(str(run)), path)
    assert "2 of its 2 names belong to several pictures" in str(caught.value)
    assert "/data/cat/1.jpg and /data/dog/1.jpg; name them by `uri`" in str(caught.value)


def test_a_picture_of_the_web_has_one_label_by_whichever_name(tmp_path: Path) -> None:
    uris = [f"https://h/{row}.jpg?x={row}" for row in range(6)]
    store = FeatureStore.open(str(write_run(tmp_path / "run", RunContent({"cls": clustered(6, 8, 2)}, uris=uris))))
    same = write_csv(
        tmp_path / "same.csv", "name,label", ["0.jpg,a", "1.jpg?x=1,b", "0.jpg?x=0,a", "1.jpg,b", "2.jpg,a"]
    )
    found = labels_from_csv(store, same)
    assert dict(zip(found.rows.tolist(), found.labels, strict=True)) == {0: "a", 1: "b", 2: "a"}
    assert len(found.rows) == 3
    two = write_csv(tmp_path / "two.csv", "name,label", ["0.jpg,a", "1.jpg,b", "0.jpg?x=0,b"])
    with pytest.raises(SpecError, match=r"0.jpg is `a` and 0.jpg\?x=0 is `b`, and both are names of row 0; leave one"):
        labels_from_csv(store, two)


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        ("name,label", ["1.jpg,a", "1.jpg,b"], "line 3 says that `name` 1.jpg is `b`, .* it is `a`; .* by `uri`"),
        ("row,label", ["1,a", "2,b", "1.0,b"], "line 4 says that `row` 1 is `b`, .* it is `a`; leave one of them$"),
        ("label,row", ["a,1", "b"], "line 3 has no `row`; fill it in"),
        ("label,row", ["a,1", "b, "], "line 3 has no `row`; fill it in"),
    ],
)
def test_lines_that_make_no_sense(
    store: FeatureStore, tmp_path: Path, header: str, lines: list[str], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        labels_from_csv(store, write_csv(tmp_path / "l.csv", header, lines))


def test_row_numbers_as_pandas_writes_them_and_lines_without_a_label(store: FeatureStore, tmp_path: Path) -> None:
    lines = ["7.0, a ", "8,a", " 9 ,b", "10.5,b", "99.0,b", "11,", "12,  ", "13", "7,a"]
    found = labels_from_csv(store, write_csv(tmp_path / "l.csv", "row,label", lines))
    assert dict(zip(found.rows.tolist(), found.labels, strict=True)) == {7: "a", 8: "a", 9: "b"}
    assert (found.named, found.unknown) == (5, ("10.5", "99"))


class Compared(np.ndarray):
    """An array that counts how often it is compared as a whole."""

    times = 0

    def __eq__(self, other: Any) -> Any:
        Compared.times += 1
        return np.asarray(self) == other


def test_draws_go_over_the_labels_once_however_many_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(0).permutation(np.repeat(np.arange(50), np.arange(3, 53)))
    labelled = Labelled(np.arange(len(codes)), codes.view(Compared), [f"{code:02d}" for code in range(50)])
    monkeypatch.setattr(Compared, "times", 0)
    rest, tested = split(labelled, 0.3, np.random.default_rng(1))
    few = shots(labelled, 2, np.random.default_rng(1))
    assert Compared.times <= 2
    rng, wanted = np.random.default_rng(1), []
    for code in range(50):
        members = rng.permutation(np.flatnonzero(codes == code))
        wanted += members[: round(0.3 * len(members))].tolist()
    assert tested.positions.tolist() == sorted(wanted)
    assert rest.positions.tolist() == sorted(set(range(len(codes))) - set(wanted))
    rng = np.random.default_rng(1)
    chosen = [rng.choice(np.flatnonzero(codes == code), 2, replace=False) for code in range(50)]
    assert few.positions.tolist() == sorted(np.concatenate(chosen).tolist())


def test_files_of_the_same_bytes_are_on_one_side_of_a_split(tmp_path: Path) -> None:
    # 40 pictures of two classes, each of which is listed three times under as many names.
    codes = np.arange(120) % 2
    digests = [f"{row % 40:064x}" for row in range(120)]
    content = RunContent({"cls": clustered(120, 8, 2)}, user={"kind": [f"k{code}" for code in codes]}, sha256=digests)
    store = FeatureStore.open(str(write_run(tmp_path, content)))
    labelled = locate(store.load("cls"), labels_from_column(store, "kind"), same_bytes(store))
    rest, test = split(labelled, 0.2, np.random.default_rng(0))
    rest, validation = split(rest, 0.2, np.random.default_rng(0))
    sides = [{row % 40 for row in side.positions.tolist()} for side in (rest, validation, test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 40
    assert [len(side.positions) for side in (rest, validation, test)] == [3 * 26, 3 * 6, 3 * 8]
    assert np.bincount(test.codes).tolist() == [12, 12]


def test_a_class_of_one_picture_is_not_tested(tmp_path: Path) -> None:
    digests = [f"{max(row, 5):064x}" for row in range(16)]
    content = RunContent({"cls": clustered(16, 8, 2)}, user={"kind": ["a"] * 6 + ["b"] * 10}, sha256=digests)
    store = FeatureStore.open(str(write_run(tmp_path, content)))
    labelled = locate(store.load("cls"), labels_from_column(store, "kind"), same_bytes(store))
    assert np.bincount(split(labelled, 0.2, np.random.default_rng(0))[1].codes).tolist() == [0, 2]
    with pytest.raises(SpecError, match="every class has a single example"):
        split(labelled.take(np.arange(7)), 0.2, np.random.default_rng(0))


def test_few_examples_are_different_pictures(tmp_path: Path) -> None:
    # Of class `a` 3 pictures are listed 20 times each, of class `b` 60 are listed once.
    digests = [f"{row % 3 if row < 60 else row:064x}" for row in range(120)]
    content = RunContent({"cls": clustered(120, 8, 2)}, user={"kind": ["a"] * 60 + ["b"] * 60}, sha256=digests)
    store = FeatureStore.open(str(write_run(tmp_path, content)))
    labelled = locate(store.load("cls"), labels_from_column(store, "kind"), same_bytes(store))
    for seed in range(5):
        few = shots(labelled, 3, np.random.default_rng(seed))
        assert {row % 3 for row in few.positions[few.codes == 0].tolist()} == {0, 1, 2}
        assert len(few.codes) == 6
    with pytest.raises(SpecError, match="--shots 4: class `a` has 3 examples to learn from, with files of the same"):
        shots(labelled, 4, np.random.default_rng(0))


def test_copies_of_pictures_do_not_teach_what_is_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Nothing can be learned from these vectors but by having seen the very picture.
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.standard_normal((150, 8), np.float32), 2, axis=0)
    kinds = [f"k{code}" for code in np.repeat(rng.integers(0, 2, 150), 2)]
    content = RunContent({"cls": vectors}, user={"kind": kinds}, sha256=[f"{row // 2:064x}" for row in range(300)])
    assert retrieve_labels.probe(str(write_run(tmp_path, content)), label_column="kind", as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["knn"]["accuracy"] < 0.7
