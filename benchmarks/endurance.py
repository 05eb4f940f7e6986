"""Whether a job's memory stays flat: one long job, and the memory of each of its processes as it goes.

    python benchmarks/endurance.py PHOTOS [--size vit-tiny] [--minutes 60] [--every 10] [--json F]

The photos are listed over and over again in one table, and the job is stopped with SIGTERM when the time is up. What
counts is memory that a process has for itself (resident and not shared), of the largest process in each role: driver,
actors, decoders, and Ray's own. Bytes that Ray's object store moved to disk are counted as well.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from common import environment, make_model, median, write

# More than the smallest of the models can do, so that time ends the job and not the table.
_ROWS_A_CORE_SECOND = 100
_PATIENCE_S = 300
_ROLES = ("driver", "actor", "decoder", "ray")
Sample = dict[str, float]


def role(process: psutil.Process, driver: int) -> str:
    """What a process of the job does, from the title that Ray gives its workers."""
    title = " ".join(process.cmdline())
    if process.pid == driver:
        return "driver"
    if "PredictActor" in title:
        return "actor"
    # Decoding tasks come and go; between two of them their worker idles.
    return "decoder" if title.startswith(("ray::MapBatches", "ray::IDLE")) else "ray"


def sample(driver: int, started: float) -> Sample:
    """MiB of the largest process in each role, all alone its own."""
    found: Sample = {"seconds": time.monotonic() - started} | dict.fromkeys(_ROLES, 0.0)
    parent = psutil.Process(driver)
    for process in [parent, *parent.children(recursive=True)]:
        try:
            memory = process.memory_info()
            name = role(process, driver)
        except psutil.Error:
            continue  # ended meanwhile
        found[name] = max(found[name], (memory.rss - memory.shared) / 2**20)
    return found


def spilled_bytes(folder: Path) -> int:
    """Bytes that Ray's object store has on disk below its session's folder."""
    return sum(file.stat().st_size for file in folder.rglob("ray_spilled_objects*/*") if file.is_file())


def watch(command: list[str], folder: Path, minutes: float, every: float) -> tuple[list[Sample], int]:
    """Samples of the job from its first part on, and the most bytes ever spilled. Ends the job when time is up."""
    samples: list[Sample] = []
    spilled = 0
    log = (folder / "job.log").open("w")
    with subprocess.Popen(
        command, env={**os.environ, "RAY_TMPDIR": str(folder)}, stdout=log, stderr=subprocess.STDOUT
    ) as job:
        began = time.monotonic()
        while not any(folder.glob("out/images/*")):
            if job.poll() is not None or time.monotonic() - began > _PATIENCE_S:
                job.terminate()
                raise SystemExit(f"no part appeared:\n{(folder / 'job.log').read_text()[-2000:]}")
            time.sleep(0.2)
        started = time.monotonic()
        while time.monotonic() - started < minutes * 60:
            if job.poll() is not None:
                raise SystemExit(f"the job ended by itself:\n{(folder / 'job.log').read_text()[-2000:]}")
            samples.append(sample(job.pid, started))
            spilled = max(spilled, spilled_bytes(folder))
            time.sleep(every)
        job.terminate()
    return samples, spilled


def growth(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """By role: medians of the second and of the last tenth of the samples, and the peak, in MiB.

    The first tenth is left out, because buffers grow to the largest picture then.
    """
    tenth = max(1, len(samples) // 10)

    def middle(some: Iterable[Sample], name: str) -> float:
        return median([one[name] for one in some])

    return {
        name: {
            "early_mib": middle(samples[tenth : 2 * tenth] or samples, name),
            "late_mib": middle(samples[-tenth:], name),
            "peak_mib": max(one[name] for one in samples),
        }
        for name in _ROLES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--size", default="vit-tiny")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two samples")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    model = make_model(Path(tempfile.gettempdir()) / f"patchstream-{arguments.size}", arguments.size)
    before = environment()
    photos = sorted(str(path.resolve()) for path in arguments.photos.iterdir() if path.is_file())
    # A short name: Ray's sockets lie below it, and their paths must not exceed 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ps") as name:
        folder = Path(name)
        rows = int(arguments.minutes * 60 * _ROWS_A_CORE_SECOND * len(os.sched_getaffinity(0)))
        with (folder / "photos.csv").open("w") as table:
            table.write("uri\n")
            table.writelines(f"{photos[row % len(photos)]}\n" for row in range(rows))
        command = [
            sys.executable, "-m", "jobs", "embed", str(folder / "photos.csv"), "--model", str(model),
            "--out", str(folder / "out"), "--no-report",
        ]  # fmt: skip
        samples, spilled = watch(command, folder, arguments.minutes, arguments.every)
        record: dict[str, Any] = json.loads((folder / "out/attempts/000001.json").read_text())
    shown = samples[:: max(1, len(samples) // 60)]
    result = {
        "benchmark": "endurance", "environment": before, "model": arguments.size,
        "minutes": arguments.minutes, "images": record["images"], "failures": record["failures"],
        "images_per_s": record["images_per_s"], "spilled_bytes": spilled, "memory": growth(samples),
        "samples": [{key: round(value, 1) for key, value in one.items()} for one in shown],
    }  # fmt: skip
    write(arguments.json, result)


if __name__ == "__main__":
    main()
