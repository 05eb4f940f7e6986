"""How long freezing a manifest and comparing an update take, and how much memory: `python -m benchmarks.sources`.

The addresses are made up as fast as Python can, in the batches that a listing gives; nothing is asked of a store.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from benchmarks.common import environment
from pipeline.sources.columns import content_table
from pipeline.sources.manifest import write_manifest
from pipeline.sources.update import new_and_changed

_BATCH_ROWS = 16_384
_CHANGED_EVERY = 100_000


def listing(rows: int, *, later: bool = False) -> Iterator[pa.Table]:
    """Batches as a listing gives them; `later`, some objects have changed."""
    for start in range(0, rows, _BATCH_ROWS):
        numbers = range(start, min(rows, start + _BATCH_ROWS))
        changed = [later and number % _CHANGED_EVERY == 0 for number in numbers]
        etags = [f"{number:031x}{int(new)}" for number, new in zip(numbers, changed, strict=True)]
        uris = [f"s3://a-bucket/with/a/prefix/{number:012d}.jpg" for number in numbers]
        yield content_table(uris, {"size": numbers, "etag": etags})


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` gives; seconds, seconds of CPU, and MiB of memory above what the process held before."""
    process, stop, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    try:
        result = work()
    finally:
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        stop.set()
        watcher.join()
    return result, {
        "wall_s": round(wall_s, 2),
        "cpu_s": round(cpu_s, 2),
        "peak_mib": round(max(0, peak[0] - before) / 2**20),
    }


def all_done(rows: np.ndarray) -> np.ndarray:
    return np.ones(len(rows), bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    _, alone = measured(lambda: sum(len(table) for table in listing(rows)))
    with tempfile.TemporaryDirectory() as out:
        parts, freeze = measured(lambda: write_manifest(listing(rows), out, {}))
        found, update = measured(
            lambda: sum(len(table) for table in new_and_changed(listing(rows, later=True), out, parts, all_done, {}))
        )
    assert found == -(-rows // _CHANGED_EVERY)
    report = {"benchmark": "sources", "rows": rows, "making_the_addresses": alone, "freeze": freeze, "update": update}
    print(json.dumps({**report, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
