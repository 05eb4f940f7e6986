"""The command line as a person runs it: another process, its output, its workers by what they do."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pyarrow.dataset as ds
import pyarrow.parquet as pq

PATCHSTREAM = (sys.executable, "-m", "jobs")
# How Ray titles the worker processes of the two stages.
ACTOR_TITLE = "MapBatches(PredictActor)"
DECODER_TITLE = "MapBatches(decode_rows)"


def patchstream(*arguments: str | Path, timeout_s: float = 240, env: Mapping[str, str] | None = None) -> Any:
    """Run a command to its end; the result has returncode, stdout and stderr as text."""
    return subprocess.run(
        [*PATCHSTREAM, *map(str, arguments)], capture_output=True, text=True, timeout=timeout_s, check=False, env=env
    )


def start(*arguments: str | Path, log: Path, env: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """Start a command in a session of its own, its output in `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [*PATCHSTREAM, *map(str, arguments)], stdout=file, stderr=file, env=env, start_new_session=True
        )


def workers(driver: int, title: str) -> list[psutil.Process]:
    """Ray worker processes below `driver` whose title names a stage."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def rows_in(out: Path, folder: str = "images") -> list[int]:
    """Row numbers over all parts of a folder, as a plain glob sees them."""
    files = sorted(path for path in (out / folder).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file, columns=["row"])["row"].to_pylist()]


def table(out: Path, folder: str = "images") -> Any:
    """All rows of a folder as one Arrow table, by row."""
    return ds.dataset(sorted(map(str, (out / folder).glob("*.parquet")))).to_table().sort_by("row")


def attempt_records(out: Path) -> list[dict[str, Any]]:
    """What the attempts on a directory left behind, oldest first."""
    return [json.loads(path.read_text()) for path in sorted((out / "attempts").glob("*.json"))]


def end(pid: int) -> None:
    """Kill a driver and all below it: nothing that a test started outlives the test."""
    if psutil.pid_exists(pid):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with contextlib.suppress(psutil.Error):
                process.kill()
