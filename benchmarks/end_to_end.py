"""How close the whole job comes to the ideal on this machine.

    python benchmarks/end_to_end.py PHOTOS [--size vit-base] [--dtype bfloat16] [--images 400] [--rounds 3] [--json F]

The ideal is one over the core-seconds that decoding and the bare forward pass of an image take, each measured alone
on the same cores. A shared machine's speed differs from minute to minute, so each round measures the forward pass
before and after the job, which is held against the mean of both; medians are taken over the rounds. Start-up (from the
command to the first finished batch, Ray included) is reported apart from the steady state behind it.
"""

import argparse
import multiprocessing
import os
import queue
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import environment, make_model, median, write


def decode_core_seconds(photos: list[str], model: Path) -> float:
    """CPU seconds to fetch and decode one photo, in one process."""
    import pyarrow as pa

    from pipeline.images.limits import steady_memory
    from pipeline.images.stage import Reading, fetch_and_decode
    from pipeline.models import inspect_model
    from pipeline.sources.expand import expand
    from schemas.spec import build_spec
    from schemas.tables import MANIFEST_FIELDS

    spec = build_spec({"sources": photos, "model": "-", "out": "/nonexistent"})
    content = pa.concat_tables(table for photo in photos for table in expand(photo, spec))
    manifest = content.add_column(0, MANIFEST_FIELDS[0], pa.array(range(len(content)), pa.int64()))
    preprocessing = inspect_model(str(model)).preprocessing

    def decode(rows: pa.Table) -> int:
        return sum(table.num_rows for table in fetch_and_decode(rows, Reading(preprocessing), batch_rows=32))

    steady_memory()
    decode(manifest.slice(0, 8))  # what is imported at the first photo is start-up
    started = time.process_time()
    rows = decode(manifest)
    return (time.process_time() - started) / rows


def _forward(model: Path, dtype: str, threads: int, batches: int, batch: int, ready: Any, results: Any) -> None:
    import torch

    from pipeline.models import inspect_model, load_model

    torch.set_num_threads(threads)
    network = load_model(inspect_model(str(model)), dtype=getattr(torch, dtype))
    pixels = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8)
    with torch.inference_mode():
        network(pixels)
        ready.wait()
        started = time.perf_counter()
        for _ in range(batches):
            network(pixels)
    results.put(time.perf_counter() - started)


def forward_core_seconds(model: Path, dtype: str, batch: int, images: int) -> dict[str, float]:
    """Core-seconds of a bare forward pass of one image: all cores on one batch, and one batch for each core."""
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    found = {}
    for name, processes, threads in (("one_process", 1, cores), ("process_a_core", cores, 1)):
        ready, results = context.Barrier(processes), context.Queue()
        batches = max(2, images // (batch * processes))
        arguments = (model, dtype, threads, batches, batch, ready, results)
        workers = [context.Process(target=_forward, args=arguments) for _ in range(processes)]
        for worker in workers:
            worker.start()
        seconds = [results.get() for _ in workers]
        for worker in workers:
            worker.join()
        found[name] = max(seconds) * cores / (batches * batch * processes)
    return found


def job(photos: list[str], model: Path, dtype: str, images: int) -> dict[str, Any]:
    """The whole job on at least `images` rows in a process of its own, as a command is; its attempt record.

    `command_to_first_batch_s` counts from before the process is there until rows come back from an actor.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    started = time.time()
    worker = context.Process(target=_job, args=(photos, model, dtype, images, started, results))
    worker.start()
    record: dict[str, Any] | None = None
    while record is None:
        try:
            record = results.get(timeout=5)
        except queue.Empty:
            if not worker.is_alive():
                raise SystemExit(f"the job's process ended with code {worker.exitcode}") from None
    worker.join()
    if record["images"] != images:
        raise SystemExit(f"{record['images']} of {images} images came through: {record}")
    return record


def _job(photos: list[str], model: Path, dtype: str, images: int, started: float, results: Any) -> None:
    from cluster.session import ray_session
    from pipeline.flow import run
    from pipeline.progress import Progress
    from schemas.spec import build_spec

    first: list[float] = []

    def listen(progress: Progress) -> None:
        if progress.phase == "running" and not first:
            first.append(time.time() - started)

    record: dict[str, Any] = {"images": 0}
    try:
        with tempfile.TemporaryDirectory() as out:
            sources = photos * -(-images // len(photos))
            values = {"sources": sources, "model": str(model), "out": f"{out}/o", "dtype": dtype, "limit": images}
            record = run(build_spec(values), partial(ray_session), listen).attempt.model_dump()
        record["command_to_first_batch_s"] = first[0]
        record["command_to_end_s"] = time.time() - started
    finally:
        results.put(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--size", default="vit-base")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json")
    options = parser.parse_args()
    photos = sorted(str(path) for path in options.photos.rglob("*") if path.is_file())
    model = options.model or make_model(Path(tempfile.gettempdir()) / f"patchstream-{options.size}", options.size)
    before = environment()
    rounds = []
    for _ in range(options.rounds):
        both = [forward_core_seconds(model, options.dtype, options.batch, max(32, options.images // 4))]
        record = job(photos, model, options.dtype, options.images)
        decode = decode_core_seconds(photos, model)
        both.append(forward_core_seconds(model, options.dtype, options.batch, max(32, options.images // 4)))
        forward = min(sum(found[name] for found in both) / 2 for name in both[0])
        ideal = before["cores"] / (decode + forward)
        rounds.append(
            {"decode": decode, "forward": both, "forward_core_s": forward, "ideal": ideal, "job": record}
            | {"share": record["images_per_s"] / ideal}
        )
    write(
        options.json,
        {
            "benchmark": "end_to_end",
            "environment": before,
            "model": str(model.name),
            "dtype": options.dtype,
            "images": options.images,
            "decode_core_s": median([item["decode"] for item in rounds]),
            "forward_core_s": median([item["forward_core_s"] for item in rounds]),
            "ideal_images_per_s": median([item["ideal"] for item in rounds]),
            "steady_images_per_s": median([item["job"]["images_per_s"] for item in rounds]),
            "share_of_ideal": median([item["share"] for item in rounds]),
            "command_to_first_batch_s": median([item["job"]["command_to_first_batch_s"] for item in rounds]),
            "rounds": rounds,
        },
    )


if __name__ == "__main__":
    main()
