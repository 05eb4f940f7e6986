"""What the README tells people to type works as it stands there, on the output of a real run."""

import os
import re
import shlex
from pathlib import Path

import pytest
from support.commands import patchstream

from jobs.demo.draw import write_pictures

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DEMO_MODEL = ROOT / "jobs" / "demo" / "model"
ROWS = 60

pytestmark = pytest.mark.slow


def lines_of(title: str, language: str) -> list[str]:
    """The lines of all code blocks of a language in one section of the README."""
    section = README.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)).splitlines()


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `features` is a run over drawn pictures."""
    folder = tmp_path_factory.mktemp("readme")
    write_pictures(folder / "photos", ROWS, seed=5)
    done = patchstream("embed", folder / "photos", "--model", DEMO_MODEL, "--labels", "5", "--out", folder / "features")
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout)
    (folder / "told").write_text(done.stderr)
    return folder


def test_what_is_printed_is_ours(features: Path) -> None:
    """Ray and Ray Data speak with --verbose alone."""
    told = [line for line in (features / "told").read_text().splitlines() if line]
    assert [line for line in told if not re.match("… |[0-9,]+/[0-9,]+ ", line)] == []


def test_the_next_command_that_is_printed_works(features: Path) -> None:
    program, *command = shlex.split((features / "said").read_text().splitlines()[-1].removeprefix("next: "))
    assert program == "patchstream"
    done = patchstream(*command)
    assert done.returncode == 0, done.stderr
    assert "width" in done.stdout


def test_duckdb_line(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import duckdb

    monkeypatch.chdir(features)
    (line,) = [line for line in lines_of("Ask the output", "sh") if line.startswith("duckdb ")]
    program, option, query = shlex.split(line)
    assert (program, option) == ("duckdb", "-c")
    found = duckdb.sql(query).fetchall()
    assert sum(count for _, count in found) == ROWS
    assert found[0][1] == max(count for _, count in found)
    assert all(isinstance(label, str) for label, _ in found)


def test_pandas_and_polars_lines(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas
    import polars

    monkeypatch.chdir(features)
    names = {"pandas": pandas, "polars": polars, "pl": polars}
    results = {line.split(".")[0]: eval(line, names) for line in lines_of("Ask the output", "python")}
    assert list(results["pandas"].columns) == ["uri", "cls"]
    assert len(results["pandas"]) == ROWS
    assert results["polars"].columns == ["uri", "pooled"]


@pytest.mark.parametrize("command", ["duplicates", "kmeans", "sql", "search"])
def test_command_lines(features: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(features)
    (line,) = [line for line in lines_of("Ask the output", "sh") if line.startswith(f"patchstream {command} ")]
    arguments = shlex.split(line, comments=True)[1:]
    picture = str(next((features / "photos").rglob("*.png"), None) or next((features / "photos").rglob("*.jpg")))
    # From another folder, the folders of the tests must not be taken for the packages.
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = patchstream(*[picture if argument == "cat.jpg" else argument for argument in arguments], env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_python_lines(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(features)
    lines = "\n".join(lines_of("Commands", "python"))
    lines = lines.replace("google/vit-base-patch16-224", str(DEMO_MODEL)).replace('"features"', '"from_python"')
    names: dict[str, object] = {}
    exec(lines, names)
    assert names["summary"].images == ROWS  # type: ignore[attr-defined]
