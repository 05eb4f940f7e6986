"""What `report` and `explore` say of a directory with damaged files: which one it is, and what helps."""

import json
from pathlib import Path

import pytest
from report.album import Album, add_attempts, damage_column

from pipeline.report import write_report
from pipeline.report.lookup import RowLookup
from pipeline.report.run import open_run
from schemas.errors import OutputError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Album(tmp_path, count=6, failed={}).write()


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_report_names_a_damaged_record_of_an_attempt(directory: Path, content: str) -> None:
    add_attempts(directory)
    damaged = directory / "attempts" / "1.json"
    damaged.write_text(content, encoding="latin-1")
    with pytest.raises(OutputError, match=rf"{damaged} is not the record of an attempt .*; if no job runs there, rem"):
        open_run(str(directory), {})


def test_report_without_the_record_of_an_attempt_that_was_just_begun(directory: Path) -> None:
    add_attempts(directory)
    (directory / "attempts" / "2.json").write_bytes(b"")
    assert [attempt.attempt for attempt in open_run(str(directory), {}).attempts] == [1]


def test_the_last_attempt_is_at_work_whatever_the_clock_of_its_host_says(directory: Path) -> None:
    add_attempts(directory)
    for number, started in ((1, "2026-01-01T10:00:00+00:00"), (2, "2026-01-01T09:58:00+00:00")):
        path = directory / "attempts" / f"{number}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "status": "running", "started": started}))
    found = {attempt.attempt: attempt.status for attempt in open_run(str(directory), {}).attempts}
    assert found == {1: "taken over", 2: "running"}


@pytest.mark.parametrize(("folder", "column"), [("manifest", "replaces"), ("images", "width")])
def test_report_names_a_damaged_part(directory: Path, folder: str, column: str) -> None:
    part = min((directory / folder).iterdir())
    damage_column(part, column)
    with pytest.raises(OutputError, match=rf"{part} is damaged, .*`patchstream verify` says more"):
        write_report(str(directory))


def test_report_names_a_part_that_is_damaged_where_a_row_is_looked_up(directory: Path) -> None:
    lookup = RowLookup(open_run(str(directory), {}), "images", ["row", "uri"])
    part = min((directory / "images").iterdir())
    damage_column(part, "uri")
    with pytest.raises(OutputError, match=rf"{part} is damaged, .*`patchstream verify` says more"):
        lookup.get([0])
