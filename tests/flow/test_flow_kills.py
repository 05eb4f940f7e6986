"""kill -9 at random moments, then the same command again: every row once, nothing committed is done again.

`make kills` runs this many times over; here each kind of victim dies once or twice.
"""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.commands import (
    ACTOR_TITLE,
    DECODER_TITLE,
    attempt_records,
    end,
    patchstream,
    rows_in,
    start,
    table,
    workers,
)

KILLS = int(os.environ.get("PATCHSTREAM_KILLS", "3"))
VICTIMS = ("driver", ACTOR_TITLE, DECODER_TITLE)

pytestmark = pytest.mark.slow

CONFIG = """
labels = 2
batch_size = 4
[sink]
commit_s = 0.5
"""


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory, pictures: Path, checkpoint: Path) -> tuple[str, ...]:
    """The arguments of a job of a few hundred rows, all but --out."""
    config = tmp_path_factory.mktemp("config") / "job.toml"
    config.write_text(CONFIG)
    return ("embed", *[str(pictures)] * 4, "--model", str(checkpoint), "--config", str(config), "--no-report")


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory, job: tuple[str, ...]) -> Path:
    """The same job, left alone."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = patchstream(*job, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_and_run_again(tmp_path: Path, job: tuple[str, ...], expected: Path, number: int) -> None:
    rng = random.Random(number)
    victim = VICTIMS[number % len(VICTIMS)]
    out = tmp_path / "out"
    log = tmp_path / "log"
    driver = start(*job, "--out", out, log=log)
    try:
        wait_until(lambda: bool(rows_in(out)), driver.pid, "a first part while the job runs")
        time.sleep(rng.uniform(0, 2))
        if victim == "driver":
            os.kill(driver.pid, signal.SIGKILL)
        else:
            for process in workers(driver.pid, victim)[:1]:
                process.send_signal(signal.SIGKILL)
        driver.wait(timeout=200)
    finally:
        end(driver.pid)
    assert no_row_twice(out)
    settle(out)
    committed = len(rows_in(out)) + len(rows_in(out, "failures"))
    total = len(rows_in(expected)) + len(rows_in(expected, "failures"))
    assert driver.returncode == (-signal.SIGKILL if victim == "driver" else 0), log.read_text()

    again = patchstream(*job, "--out", out)
    assert again.returncode == 0, again.stderr
    records = attempt_records(out)
    assert records[-1]["rows_planned"] == total - committed, "committed rows were planned again"
    assert records[-1]["images"] + records[-1]["failures"] == total - committed
    same_result(out, expected)
    assert patchstream("verify", out).returncode == 0


def wait_until(condition: object, pid: int, what: str, timeout_s: float = 120) -> None:
    """Poll until `condition()` holds while the process is alive."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert psutil.pid_exists(pid), f"the job ended before {what}"
        assert time.monotonic() < deadline, f"no sign of {what} in {timeout_s} s"
        time.sleep(0.05)


def settle(out: Path) -> None:
    """Orphaned workers of a killed driver end by themselves; what they still commit counts as committed."""
    before = -1
    while before != (now := len(list(out.glob("*/part-*.parquet")))):
        before = now
        time.sleep(1.0)


def no_row_twice(out: Path) -> bool:
    rows = rows_in(out) + rows_in(out, "failures")
    return len(rows) == len(set(rows))


def same_result(out: Path, expected: Path) -> None:
    """Same rows in the same places, and each row has the features of its own picture."""
    mine, theirs = table(out), table(expected)
    assert mine["row"].to_pylist() == theirs["row"].to_pylist()
    assert rows_in(out, "failures") == rows_in(expected, "failures")
    assert mine["sha256"].to_pylist() == theirs["sha256"].to_pylist()
    for name in ("cls", "pooled"):
        ours = np.array(mine[name].to_pylist())
        reference = np.array(theirs[name].to_pylist())
        np.testing.assert_allclose(ours, reference, atol=1e-4 * max(1.0, float(np.abs(reference).max())))
