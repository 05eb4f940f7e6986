"""Time and memory by the number of manifest rows, without pictures and without a model.

    python benchmarks/scale.py [--rows 1000 10000 …] [--planning 100000000] [--json F]
    python benchmarks/scale.py --picture F.json docs/pictures/scale.svg

For each size (by default 1 thousand to 10 million by powers of ten), in a process of its own: freeze a manifest from a
Parquet table of addresses, run the job with the null predictor while the driver's memory is sampled, then plan a resume
of the finished run and of one with holes in it.
`--planning` does only the last, for a size that would take hours to run.
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

_PART_ROWS = 44_000


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
    """Resume planning when every tenth row is missing and no part is dense: every part has to be opened.

    Parts are as large as `compact` makes them for ViT-B/16 with `cls` and `pooled`: 256 MiB at about 6 KB a row.
    """
    import fsspec
    import numpy as np
    import pyarrow as pa

    from pipeline.sinks.intervals import count
    from pipeline.sinks.ledger import pending, read_ledger
    from pipeline.sinks.parts import write_part

    written = 0
    for start in range(0, rows, _PART_ROWS):
        numbers = np.arange(start, min(start + _PART_ROWS, rows))
        numbers = numbers[numbers % 10 > 0]
        table = pa.table({"row": numbers, "uri": pa.nulls(len(numbers), pa.string())})
        write_part(fsspec.filesystem("file"), out, "images", table, b"{}")
        written += len(numbers)
    started = time.monotonic()
    missing = count(pending(read_ledger(out, {}), 0, rows))
    seconds = time.monotonic() - started
    assert missing == rows - written
    return {"rows": rows, "parts": -(-rows // _PART_ROWS), "pending": missing, "resume_planning_s": seconds}


def picture(results: list[dict[str, Any]]) -> str:
    """Time of the stream and the driver's memory by rows, as SVG."""
    from math import log10

    from pipeline.retrieval.plots import line_charts

    rows = [log10(result["rows"]) for result in results]
    seconds = [log10(result["seconds"]) for result in results]
    peak = [result["driver_last_mib"] or 0.0 for result in results]
    charts = [
        ("whole job, log₁₀ of seconds", rows, seconds, rows[0]),
        ("driver at the end of the stream, MiB", rows, [0.0, *peak[1:]] if not peak[0] else peak, rows[0]),
    ]
    return line_charts(charts, "log₁₀ of rows", from_zero=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**power for power in range(3, 8)])
    parser.add_argument("--json")
    parser.add_argument("--planning", type=int, help="also plan a resume of so many rows, without running them")
    parser.add_argument("--picture", nargs=2, metavar=("JSON", "SVG"), help="draw what an earlier call measured")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.picture:
        Path(options.picture[1]).write_text(picture(json.loads(Path(options.picture[0]).read_text())["results"]))
        return
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    before = environment()
    results = []
    for rows in options.rows:
        command = [sys.executable, str(Path(__file__)), "--one", str(rows)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    found: dict[str, Any] = {"benchmark": "scale", "environment": before, "results": results}
    if options.planning:
        with tempfile.TemporaryDirectory() as folder:
            found["planning"] = plan_with_holes(folder, options.planning)
    write(options.json, found)


if __name__ == "__main__":
    main()
