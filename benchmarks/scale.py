"""Time and memory by the number of manifest rows, without pictures and without a model.

    python benchmarks/scale.py [--rows 1000 10000 100000 1000000] [--json F]

For each size, in a process of its own: freeze a manifest from a Parquet table of addresses, run the job with the null
predictor while the driver's memory is sampled, then plan a resume of the finished run and of one with holes in it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import environment, write


def sample_memory(samples: list[tuple[int, int]], done: list[int], stop: threading.Event) -> None:
    """Resident bytes of this process and rows done so far, twice a second."""
    import psutil

    process = psutil.Process()
    while not stop.wait(0.5):
        samples.append((done[0], process.memory_info().rss))


def measure(rows: int) -> dict[str, Any]:
    """All figures for one size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cluster.session import ray_session
    from pipeline.flow import run
    from pipeline.sinks.intervals import count
    from pipeline.sinks.ledger import pending, read_ledger
    from schemas.spec import build_spec

    with tempfile.TemporaryDirectory() as folder:
        table = f"{folder}/rows.parquet"
        pq.write_table(pa.table({"uri": [f"s3://bucket/shelf/{row:012d}.jpg" for row in range(rows)]}), table)
        spec = build_spec({"sources": [table], "model": "null", "out": f"{folder}/o", "backend": "null"})
        samples: list[tuple[int, int]] = []
        done, stop = [0], threading.Event()
        sampler = threading.Thread(target=sample_memory, args=(samples, done, stop))

        def listen(progress: Any) -> None:
            done[0] = progress.done
            if progress.phase == "running" and not sampler.is_alive() and not stop.is_set():
                sampler.start()
            if progress.phase == "finishing":
                stop.set()  # compaction holds one part of up to 256 MiB, whatever the number of rows

        started = time.monotonic()
        summary = run(spec, partial(ray_session), listen)
        seconds = time.monotonic() - started
        stop.set()
        assert summary.images == rows
        planning = time.monotonic()
        assert count(pending(read_ledger(spec.out, {}), 0, rows)) == 0
        planning = time.monotonic() - planning
        memory = [resident for _, resident in samples]
        return {
            "rows": rows,
            "seconds": seconds,
            "stream_seconds": summary.attempt.wall_s,
            "rows_per_s": summary.attempt.images_per_s,
            "resume_planning_s": planning,
            "driver_first_mib": memory[0] / 2**20 if memory else None,
            "driver_last_mib": memory[-1] / 2**20 if memory else None,
            "driver_peak_mib": max(memory) / 2**20 if memory else None,
            "holes": plan_with_holes(f"{folder}/holes", rows),
        }


def plan_with_holes(out: str, rows: int) -> dict[str, Any]:
    """Resume planning when every tenth row is missing and no part is dense: every part has to be opened."""
    import fsspec
    import numpy as np
    import pyarrow as pa

    from pipeline.sinks.intervals import count
    from pipeline.sinks.ledger import pending, read_ledger
    from pipeline.sinks.parts import write_part

    numbers = np.flatnonzero(np.arange(rows) % 10)
    for chunk in np.array_split(numbers, max(1, rows // 50_000)):
        table = pa.table({"row": chunk, "uri": pa.array([""] * len(chunk))})
        write_part(fsspec.filesystem("file"), out, "images", table, b"{}")
    started = time.monotonic()
    missing = count(pending(read_ledger(out, {}), 0, rows))
    seconds = time.monotonic() - started
    assert missing == rows - len(numbers)
    return {"pending": missing, "resume_planning_s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--json")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    before = environment()
    results = []
    for rows in options.rows:
        command = [sys.executable, str(Path(__file__)), "--one", str(rows)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    write(options.json, {"benchmark": "scale", "environment": before, "results": results})


if __name__ == "__main__":
    main()
