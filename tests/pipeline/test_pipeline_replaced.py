"""Old versions that still stand in the parts beside their replacements, as after a kill before the last step."""

import json
import shutil
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from pipeline.maintenance import NothingToRetry, reopen_failures, status, verify
from pipeline.opening import Opened, open_directory, resolve_job
from pipeline.sinks.compaction import remove_rows
from pipeline.sinks.parts import write_part
from schemas.spec import build_spec
from schemas.tables import FAILURES_SCHEMA


def opened(tmp_path: Path, *, update: bool) -> Opened:
    values = {"sources": [str(tmp_path / "in")], "out": str(tmp_path / "out"), "model": "null", "backend": "null"}
    return open_directory(resolve_job(build_spec({**values, "update": update})))


def store(tmp_path: Path, run: Opened, errors: dict[int, str]) -> None:
    """Failures, and images the like: which of the two a row is in makes no difference here."""
    rest = {"uri": "x", "stage": "fetch", "message": "", "attempts": 1, "retryable": False}
    failures = [{"row": row, "error": error, **rest} for row, error in errors.items() if error]
    table = pa.Table.from_pylist(failures, FAILURES_SCHEMA)
    write_part(fsspec.filesystem("file"), str(tmp_path / "out"), "failures", table, run.record.part_metadata())
    images = [{"row": row, "uri": "x"} for row, error in errors.items() if not error]
    table = pa.Table.from_pylist(images, run.schema)
    write_part(fsspec.filesystem("file"), str(tmp_path / "out"), "images", table, run.record.part_metadata())


def test_rows_that_were_replaced_are_a_problem_and_count_once(tmp_path: Path) -> None:
    out, names = str(tmp_path / "out"), ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_bytes(b"first")
    store(tmp_path, opened(tmp_path, update=False), {0: "Truncated", 1: "", 2: "", 3: "NotFound"})
    assert verify(out, {}).problems == []
    for name in names[:2]:
        (tmp_path / "in" / name).write_bytes(b"second, and longer")
    run = opened(tmp_path, update=True)
    store(tmp_path, run, {4: "Truncated", 5: ""})

    (problem,) = verify(out, {}).problems
    assert problem == (
        "2 rows that newer ones replace still stand in parts: 0–1; run the same command again, which removes them"
    )
    found = status(out, {})
    counts = [found[name] for name in ("manifest_rows", "replaced", "images", "failures", "pending")]
    assert counts == [6, 2, 2, 2, 0]
    assert found["failures_by_cause"] == {"Truncated": 1, "NotFound": 1}

    for folder in ("images", "failures"):
        remove_rows(out, folder, run.replaced, {})
    assert verify(out, {}).problems == []
    assert status(out, {})["images"] == status(out, {})["failures"] == 2


def test_failures_that_were_replaced_are_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / "in" / name).write_bytes(b"first")
    store(tmp_path, opened(tmp_path, update=False), {0: "Truncated", 1: "Truncated", 2: "NotFound"})
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "in" / name).write_bytes(b"second, and longer")
    store(tmp_path, opened(tmp_path, update=True), {3: "", 4: ""})
    with pytest.raises(NothingToRetry, match="none of its 1 failures"):
        reopen_failures(str(tmp_path / "out"), False, {})
    assert reopen_failures(str(tmp_path / "out"), True, {})[0] == 1
    assert status(str(tmp_path / "out"), {})["pending"] == 1


def test_a_swap_that_was_cut_short_replaces_nothing(tmp_path: Path) -> None:
    """Its rows are out of sight; an address that was signed anew is another try only where there is no image."""
    out = tmp_path / "out"

    def listed(signature: int, *, update: bool) -> Opened:
        (tmp_path / "in").write_text(f"uri\nhttp://host/a.jpg?X-Amz-Signature={signature}\n")
        (tmp_path / "in").replace(tmp_path / "in.csv")
        values = {"sources": [str(tmp_path / "in.csv")], "out": str(out), "model": "null", "backend": "null"}
        return open_directory(resolve_job(build_spec({**values, "update": update})))

    store(tmp_path, listed(1, update=False), {0: ""})
    (part,) = (out / "images").iterdir()
    (out / "_swap").mkdir()
    shutil.move(out / "images", out / "_swap")
    (out / "images").mkdir()
    (out / "_swap" / "plan.json").write_text(json.dumps({"remove": [], "add": [f"images/{part.name}"]}))
    run = listed(2, update=True)
    assert (run.record.manifest_rows, len(run.replaced)) == (1, 0)
    assert status(str(out), {})["images"] == 1
