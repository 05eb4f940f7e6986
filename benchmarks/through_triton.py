"""What it costs to predict through a Triton server instead of in the actor, on the same machine and cores.

    python benchmarks/through_triton.py [--sizes vit-tiny vit-small] [--images 64] [--rounds 5] [--json F]

A real server (Python back end, one instance, one thread, the exported module) against the torch predictor (one
thread). Each round measures torch, Triton through shared memory and Triton over the wire in turn, on the same pictures;
the order is turned from round to round and ratios are taken within a round. Wall seconds are what a person waits for;
core seconds, of this process and of all the server's, are what it costs, and stand still on a machine that is shared.
The outputs must agree within 1e-5.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
from common import environment, make_model, median, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

MAX_BATCH = 16
BACKENDS = ("torch", "triton_shared_memory", "triton_wire")


def pictures(count: int, side: int) -> pa.Table:
    """A decoded table of `count` random pictures."""
    from schemas.tables import decoded_schema

    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, side * side * 3, np.uint8).tobytes() for _ in range(count)]
    schema = decoded_schema([])
    columns = {"row": range(count), "uri": [str(row) for row in range(count)], "pixels": pixels}
    return pa.table({field.name: columns.get(field.name, [None] * count) for field in schema}, schema=schema)


class Seconds(NamedTuple):
    """Of one call: on the clock, and of cores."""

    wall: float
    core: float


def core_seconds(server: int) -> float:
    """Of this process, and of the server's process `server` and all below it."""
    tree = [psutil.Process(server), *psutil.Process(server).children(recursive=True)]
    return time.process_time() + sum(sum(process.cpu_times()[:2]) for process in tree)


def timed(predict: Callable[[pa.Table], pa.Table], table: pa.Table, server: int) -> tuple[Seconds, np.ndarray]:
    """What a call takes, and its CLS features."""
    core, started = core_seconds(server), time.perf_counter()
    predicted = predict(table)
    seconds = Seconds(time.perf_counter() - started, core_seconds(server) - core)
    if predicted["error"].null_count != table.num_rows:
        raise SystemExit(f"the server failed: {predicted['message'].drop_null()[0]}")
    return seconds, np.array(predicted["cls"].to_pylist())


def compare(size: str, images: int, rounds: int) -> dict[str, Any]:
    """Medians and ratios for a model of one size."""
    from support.triton import triton_server

    from pipeline.models import inspect_model
    from pipeline.predictors.batches import Wanted
    from pipeline.predictors.torch_predictor import TorchPredictor
    from pipeline.predictors.triton import TritonPredictor
    from pipeline.predictors.triton_repository import Serving, export_triton
    from schemas.spec import TritonSpec

    model = make_model(Path(tempfile.gettempdir()) / f"patchstream-{size}", size)
    info = inspect_model(str(model))
    wanted = Wanted(("cls", "pooled"), (info.hidden_size, info.pooled_size), "float32", 5, info.labels, False)
    table = pictures(images, info.preprocessing.output_size[0])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (name,) = export_triton(info, str(folder / "repository"), Serving(max_batch_size=MAX_BATCH), onnx=False)
        server = stack.enter_context(triton_server(folder / "repository", [name], log_dir=folder))
        spec = TritonSpec(url=server.url)
        shared = TritonPredictor(info, wanted, "float32", spec)
        stack.callback(shared.close)
        wire = TritonPredictor(info, wanted, "float32", spec)
        stack.callback(wire.close)
        predictors: dict[str, Callable[[pa.Table], pa.Table]] = {
            "torch": TorchPredictor(info, wanted, dtype="float32", batch_size=8, threads=1),
            "triton_shared_memory": shared,
            "triton_wire": wire,
        }
        # The first batch lays out the weights.
        predictors["torch"](table)
        shared(table)
        # Connections are made at the first call, and told there that the server is elsewhere.
        with mock.patch("pipeline.predictors.triton_connection.is_this_host", return_value=False):
            wire(table)
        found: list[dict[str, Seconds]] = [{} for _ in range(rounds)]
        apart = 0.0
        for number, seconds in enumerate(found):
            features = {}
            for backend in BACKENDS[number % 3 :] + BACKENDS[: number % 3]:
                seconds[backend], features[backend] = timed(predictors[backend], table, server.process.pid)
            apart = max(apart, *(float(np.abs(features[b] - features["torch"]).max()) for b in BACKENDS[1:]))
    if apart > 1e-5:
        raise SystemExit(f"{size}: the back ends differ by {apart:g}")
    return {"size": size, "largest_difference": apart, **summary(found, images), "rounds": found}


def summary(rounds: list[dict[str, Seconds]], images: int) -> dict[str, Any]:
    """Medians over the rounds, of the clock and of cores."""
    result: dict[str, Any] = {}
    for kind in Seconds._fields:
        values = [{backend: getattr(seconds, kind) for backend, seconds in found.items()} for found in rounds]
        result[f"{kind}_ms_an_image"] = {b: median([v[b] for v in values]) / images * 1e3 for b in BACKENDS}
        result[f"{kind}_ratio"] = {b: median([v["torch"] / v[b] for v in values]) for b in BACKENDS[1:]}
        added = {b: median([v[b] - v["torch"] for v in values]) / images * 1e3 for b in BACKENDS[1:]}
        result[f"{kind}_ms_added_to_an_image"] = added
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["vit-tiny", "vit-small"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    before = environment()
    sizes = [compare(size, options.images, options.rounds) for size in options.sizes]
    write(options.json, {"benchmark": "triton", "environment": before, "images": options.images, "sizes": sizes})


if __name__ == "__main__":
    main()
