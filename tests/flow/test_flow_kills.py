"""kill -9 at random moments, then the same command again: every row once, nothing committed is done again.

`make kills` runs this many times over; here each kind of victim dies once.
"""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow as pa
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

KILLS = int(os.environ.get("PATCHSTREAM_KILLS", "2"))
COPIES = 4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONFIG = """
labels = 2
dtype = "float32"  # what `expected` is in
batch_size = 4
actors = { min = 1, max = 2 }  # a machine of many cores would be done before it is hit
[sink]
commit_s = 0.5
"""


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory, pictures: Path, checkpoint: Path) -> tuple[str, ...]:
    """The arguments of a job of a few hundred rows, all but --out."""
    config = tmp_path_factory.mktemp("config") / "job.toml"
    config.write_text(CONFIG)
    return ("embed", *[str(pictures)] * COPIES, "--model", str(checkpoint), "--config", str(config), "--no-report")


class Expected(NamedTuple):
    """What one copy of the pictures gives, by address."""

    features: dict[str, tuple[str, list[float], list[float]]]  # sha256, cls, pooled
    failures: set[str]

    @property
    def rows(self) -> int:
        return COPIES * (len(self.features) + len(self.failures))


@pytest.fixture(scope="session")
def expected(pictures: Path, checkpoint: Path) -> Expected:
    """The stages called directly, without Ray."""
    from support.manifests import decode_batches, manifest_of

    from pipeline.models import inspect_model
    from pipeline.predictors.batches import Wanted
    from pipeline.predictors.torch_predictor import TorchPredictor

    info = inspect_model(str(checkpoint))
    wanted = Wanted(("cls", "pooled"), (info.hidden_size, info.pooled_size), "float32", 0, (), False)
    predict = TorchPredictor(info, wanted, dtype="float32", batch_size=4)
    files = sorted(path for path in pictures.rglob("*") if path.is_file())
    done = [predict(batch) for batch in decode_batches(manifest_of(files), preprocessing=info.preprocessing)]
    rows = pa.concat_tables(done).to_pylist()
    good = [row for row in rows if row["error"] is None]
    return Expected(
        {row["uri"]: (row["sha256"], row["cls"], row["pooled"]) for row in good},
        {row["uri"] for row in rows if row["error"] is not None},
    )


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_and_run_again(tmp_path: Path, job: tuple[str, ...], expected: Expected, number: int) -> None:
    rng = random.Random(number)
    whole_job = number % 2 == 0  # or an actor and a decoder of it, which Ray replaces
    out = tmp_path / "out"
    log = tmp_path / "log"
    driver = start(*job, "--out", out, log=log)
    try:
        if not whole_job:
            kill_worker(driver, DECODER_TITLE)  # now, for decoding may be done long before the job is
        wait_until(lambda: bool(rows_in(out)), driver, "a first part while the job runs")
        time.sleep(rng.uniform(0, 2))
        if whole_job:
            os.kill(driver.pid, signal.SIGKILL)
        else:
            kill_worker(driver, ACTOR_TITLE)
        driver.wait(timeout=300)
    finally:
        end(driver.pid)
    assert no_row_twice(out)
    settle(out)
    committed = len(rows_in(out)) + len(rows_in(out, "failures"))
    assert driver.returncode == (-signal.SIGKILL if whole_job else 0), log.read_text()

    if whole_job:
        again = patchstream(*job, "--out", out)
        assert again.returncode == 0, again.stderr
        records = attempt_records(out)
        assert records[-1]["rows_planned"] == expected.rows - committed, "committed rows were planned again"
        assert records[-1]["images"] + records[-1]["failures"] == expected.rows - committed
    else:
        assert committed == expected.rows
    same_result(out, expected)
    assert patchstream("verify", out).returncode == 0


def kill_worker(driver: "subprocess.Popen[bytes]", title: str) -> None:
    """Kill one worker of a stage as soon as there is one, and see it gone while the job goes on."""
    found: list[psutil.Process] = []

    def is_there() -> bool:
        found.extend(workers(driver.pid, title)[:1])
        return bool(found)

    def is_gone() -> bool:
        try:
            return found[0].status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(is_there, driver, f"a worker {title}")
    found[0].send_signal(signal.SIGKILL)
    wait_until(is_gone, driver, f"the end of the worker {title}", timeout_s=30)


def wait_until(condition: object, driver: "subprocess.Popen[bytes]", what: str, timeout_s: float = 300) -> None:
    """Poll until `condition()` holds while the process is alive."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert driver.poll() is None, f"the job ended before {what}"
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


def same_result(out: Path, expected: Expected) -> None:
    """Each picture as many times as it was given, each row with the features of its own picture."""
    mine, failed = table(out), table(out, "failures")
    assert sorted([*mine["row"].to_pylist(), *failed["row"].to_pylist()]) == list(range(expected.rows))
    assert Counter(mine["uri"].to_pylist()) == dict.fromkeys(expected.features, COPIES)
    assert Counter(failed["uri"].to_pylist()) == dict.fromkeys(expected.failures, COPIES)
    theirs = [expected.features[uri] for uri in mine["uri"].to_pylist()]
    assert mine["sha256"].to_pylist() == [sha256 for sha256, _, _ in theirs]
    for place, name in enumerate(("cls", "pooled"), start=1):
        ours = np.array(mine[name].to_pylist())
        reference = np.array([features[place] for features in theirs])
        np.testing.assert_allclose(ours, reference, atol=1e-4 * max(1.0, float(np.abs(reference).max())))
