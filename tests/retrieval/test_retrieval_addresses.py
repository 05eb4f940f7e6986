"""Addresses that several rows have: rows of a Parquet file, redacted URLs, older versions, pictures listed again."""

import os
from pathlib import Path

import numpy as np
import pytest
from support.runs import RunContent, clustered, write_run

from pipeline.retrieval.arrays import Preparation
from pipeline.retrieval.duplicates import find_duplicates, write_duplicates
from pipeline.retrieval.labels import labels_from_csv
from pipeline.retrieval.search import Example, build_query
from pipeline.retrieval.store import FeatureStore
from schemas.errors import SpecError

SHARED = "data/table.parquet#photo.jpg"


def digests(*numbers: int) -> list[str]:
    return [f"{number:064x}" for number in numbers]


def open_run(folder: Path, content: RunContent) -> FeatureStore:
    return FeatureStore.open(str(write_run(folder, content)))


def test_an_address_of_a_row_in_no_group_is_not_to_be_deleted(tmp_path: Path) -> None:
    # Rows 0, 1 and 4, 5 are pairs; rows 1, 2 and 6 share an address, and those of row 5 and the replaced row 3 are one.
    vectors = np.eye(7, 8, dtype=np.float32)
    vectors[1], vectors[5] = vectors[0], vectors[4]
    uris = ["a.jpg", SHARED, SHARED, "b.jpg", "c.jpg", "b.jpg", SHARED]
    store = open_run(tmp_path, RunContent({"cls": vectors}, uris=uris, parts=3, replaces={5: 3}))
    summary = write_duplicates(store, find_duplicates(store, 0.9), "main", {})
    assert (tmp_path / "duplicates" / "main.delete.txt").read_text() == "b.jpg\n"
    assert summary["groups"] == 2
    assert summary["to_delete"] == 1
    assert summary["not_listed_because_kept_elsewhere"] == 1


def to_delete(folder: Path, uris: list[str]) -> list[str]:
    """The list to delete where all rows are one picture, of which row 0 is kept; all others are listed or counted."""
    store = open_run(folder, RunContent({"cls": np.ones((len(uris), 4), np.float32)}, uris=uris))
    summary = write_duplicates(store, find_duplicates(store, 0.9), "main", {})
    listed = (folder / "duplicates" / "main.delete.txt").read_text().splitlines()
    assert summary["not_listed_because_kept_elsewhere"] == len(uris) - 1 - len(listed)
    return listed


def test_the_only_copy_of_a_picture_is_not_to_be_deleted_where_a_link_to_it_is_kept(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in ("2020/x.jpg", "2020/y.jpg", "z.jpg"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(b"picture")
    (photos / "again.jpg").symlink_to("z.jpg")
    (photos / "a.jpg").symlink_to("again.jpg")
    (photos / "latest").symlink_to("2020")
    whole = [f"{photos}/{name}" for name in ("a.jpg", "again.jpg", "z.jpg", "2020/y.jpg", "latest/x.jpg")]
    assert to_delete(tmp_path / "file", whole) == whole[3:]
    linked = [f"{photos}/{name}" for name in ("2020/x.jpg", "latest/x.jpg", "latest/y.jpg", "latest/gone.jpg")]
    assert to_delete(tmp_path / "folder", linked) == linked[2:]


def test_the_only_copy_of_a_picture_is_not_to_be_deleted_where_its_name_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "z.jpg").write_bytes(b"picture")
    os.symlink(b"z.jpg", os.fsencode(tmp_path / "photos") + b"/caf\xe9.jpg")
    shown = [str(tmp_path / "photos" / name) for name in ("caf\\udce9.jpg", "z.jpg")]
    assert to_delete(tmp_path / "run", shown) == []


def test_a_kept_picture_in_another_spelling_is_not_to_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"picture")
    uris = [f"file://{tmp_path}/a.jpg", f"{tmp_path}/a.jpg", f"file://{tmp_path}/b.jpg", "s3://b/a.jpg"]
    assert to_delete(tmp_path / "disk", uris) == uris[2:]
    uris = ["s3a://bucket/a.jpg", "s3://bucket/a.jpg", "s3://bucket/b.jpg", "gs://bucket/a.jpg"]
    assert to_delete(tmp_path / "store", uris) == uris[2:]


@pytest.mark.parametrize("key", ["uri", "name"])
def test_labels_by_the_address_of_different_pictures_are_refused(tmp_path: Path, key: str) -> None:
    uris = [SHARED, "data/a.jpg", SHARED, "data/b.jpg"]
    store = open_run(tmp_path / "run", RunContent({"cls": clustered(4, 8, 2)}, uris=uris))
    names = [uri if key == "uri" else uri.rpartition("/")[2] for uri in uris]
    (tmp_path / "l.csv").write_text(f"{key},label\n{names[1]},x\n{names[0]},y\n")
    with pytest.raises(SpecError) as caught:
        labels_from_csv(store, str(tmp_path / "l.csv"))
    wanted = f"the `{key}` {names[0]} is that of rows 0, 2, which hold different pictures; name them by `row`"
    assert wanted in str(caught.value)
    (tmp_path / "l.csv").write_text("row,label\n0,x\n2,y\n")
    assert labels_from_csv(store, str(tmp_path / "l.csv")).rows.tolist() == [0, 2]


@pytest.mark.parametrize("key", ["uri", "name"])
def test_labels_go_to_the_newest_version_and_to_all_that_are_one_picture(tmp_path: Path, key: str) -> None:
    # Row 3 replaces row 0; rows 1 and 4 are one picture, listed twice.
    uris = ["data/a.jpg", "data/b.jpg", "data/c.jpg", "data/a.jpg", "data/b.jpg"]
    content = RunContent({"cls": clustered(5, 8, 2)}, uris=uris, sha256=digests(0, 1, 2, 3, 1), replaces={3: 0})
    names = [uri if key == "uri" else uri.rpartition("/")[2] for uri in uris[:3]]
    (tmp_path / "l.csv").write_text(f"{key},label\n" + "".join(f"{name},x\n" for name in names))
    found = labels_from_csv(open_run(tmp_path / "run", content), str(tmp_path / "l.csv"))
    assert sorted(found.rows.tolist()) == [1, 2, 3, 4]


def row_of(store: FeatureStore, uri: str) -> list[int]:
    return build_query(store, "cls", [Example("uri", uri)], None, Preparation()).rows.tolist()


def test_a_search_by_the_address_of_different_pictures_is_refused(tmp_path: Path) -> None:
    # Row 5 replaces row 0; rows 1 and 6 are one picture, listed twice; of rows 2, 3 and 4 row 4 has the bytes of row 2.
    uris = ["a.jpg", "b.jpg", SHARED, SHARED, SHARED, "a.jpg", "b.jpg"]
    content = RunContent({"cls": clustered(7, 8, 2)}, uris=uris, sha256=digests(0, 1, 2, 3, 2, 5, 1), replaces={5: 0})
    store = open_run(tmp_path, content)
    assert row_of(store, "a.jpg") == [5]
    assert row_of(store, "b.jpg") == [6]
    with pytest.raises(SpecError) as caught:
        row_of(store, SHARED)
    assert f"--uri {SHARED}: the address of rows 2, 3, 4, which hold different pictures; " in str(caught.value)
    assert "name one of them by its row" in str(caught.value)


def test_a_search_by_an_address_whose_new_version_is_not_there_yet(tmp_path: Path) -> None:
    uris = ["a.jpg", "b.jpg", "a.jpg"]
    content = RunContent({"cls": clustered(2, 8, 2)}, uris=uris, replaces={2: 0}, failed={2: "Truncated"})
    assert row_of(open_run(tmp_path, content), "a.jpg") == [0]
