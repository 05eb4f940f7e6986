"""What this machine can do at best, one part at a time, and how close our forward pass comes to it.

    python benchmarks/ceilings.py PHOTOS [--models vit-base beit-large] [--dtypes float32] [--batches 1 8] [--rounds 7]
        [--threads 1 2] [--parts products memory forward decode write compiled] [--json F]

- products: a large matrix product by precision, in GFLOP/s.
- memory: copying an array much larger than the caches, in GB/s (read and written bytes).
- forward: our bare forward pass beside that of transformers, in turn, same weights, precision and batch; its share of
  the large product in the same precision.
- compiled: the first of the models through torch.compile, and how long that takes; only where asked for.
- decode: one photo by size and method, in ms.
- write: encoding and storing 10,000 rows as a part.

Seconds are CPU seconds of the process divided by its threads, because on a shared machine the wall clock counts
others' work too; medians over the rounds.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import environment, make_model, median, write

PRODUCT = 2048
COPY_BYTES = 512 << 20
SIDES = ((500, 375), (1600, 1200), (4000, 3000))
ROWS = 10_000
TRANSFORMERS = {"vit": "ViTModel", "beit": "BeitModel"}


def cpu_seconds(work: Callable[[], Any], rounds: int, threads: int) -> float:
    """Median over rounds, after one that does not count."""
    return median(interleaved({"one": work}, rounds, threads)["one"])


def interleaved(works: dict[str, Callable[[], Any]], rounds: int, threads: int) -> dict[str, list[float]]:
    """CPU seconds for each thread of each work, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            started = time.process_time()
            work()
            if number:
                seconds[name].append((time.process_time() - started) / threads)
    return seconds


def products(dtypes: list[str], rounds: int, threads: int) -> dict[str, float]:
    """GFLOP/s of a PRODUCT × PRODUCT × PRODUCT product by the layer that the models have here; int8 by int8 into int32.

    The layer lays its weight out once, before the first round that counts.
    """
    from pipeline.models.kernels import choose_linear, cpu_libraries, linear_type
    from pipeline.models.precision import describe_hardware

    torch.set_num_threads(threads)
    hardware, found = describe_hardware(cuda=False), {}
    for dtype in dtypes:
        if dtype == "int8":
            a, b = (torch.randint(-127, 127, (PRODUCT, PRODUCT), dtype=torch.int8) for _ in range(2))
            work = partial(torch._int_mm, a, b.t())
        else:
            plain = torch.nn.Linear(PRODUCT, PRODUCT, dtype=getattr(torch, dtype)).requires_grad_(False)
            kind = choose_linear(dtype, "cpu", hardware, cpu_libraries())
            layer: Callable[..., Any] = plain if kind == "plain" else linear_type(kind)(plain)
            work = partial(layer, torch.randn(1, PRODUCT, PRODUCT, dtype=plain.weight.dtype))
        found[dtype] = 2e-9 * PRODUCT**3 / cpu_seconds(work, rounds, threads)
    return found


def memory(rounds: int) -> float:
    """GB/s of a copy in one thread, bytes read plus bytes written."""
    source = np.ones(COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    return 2e-9 * COPY_BYTES / cpu_seconds(lambda: np.copyto(target, source), rounds, 1)


def reference(folder: Path, dtype: str) -> Callable[[torch.Tensor], Any]:
    """transformers on the same checkpoint."""
    from jobs.demo.train import load_transformers

    transformers = load_transformers()
    kind = folder.name.rpartition("patchstream-")[2].partition("-")[0]
    loaded = getattr(transformers, TRANSFORMERS[kind]).from_pretrained(
        folder, dtype=getattr(torch, dtype), add_pooling_layer=False
    )
    return loaded.eval()  # type: ignore[no-any-return]


@torch.inference_mode()
def forward(name: str, dtypes: list[str], batches: list[int], rounds: int, threads: int) -> list[dict[str, Any]]:
    """Milliseconds an image for us and transformers (in float32 where it lacks the precision), and their ratio.

    Ours gives every output, as theirs does; and the CLS features alone, for which the last block skips the patches.
    """
    from pipeline.models import inspect_model, load_model
    from pipeline.models.cost import forward_flop
    from pipeline.models.precision import torch_dtype

    torch.set_num_threads(threads)
    folder = make_model(Path(tempfile.gettempdir()) / f"patchstream-{name}", name)
    info = inspect_model(str(folder))
    gflop = forward_flop(info.network, info.image_size) / 1e9
    found = []
    for dtype in dtypes:
        peer_dtype = "float32" if dtype == "int8" else dtype
        theirs = reference(folder, peer_dtype)
        for batch in batches:
            ours = load_model(info, dtype=torch_dtype(dtype))
            alone = load_model(info, dtype=torch_dtype(dtype), outputs=("cls",))
            pixels = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8)
            values = torch.randn(batch, 3, 224, 224, dtype=getattr(torch, peer_dtype))
            works: dict[str, Callable[[], Any]] = {
                "ours": lambda ours=ours, pixels=pixels: ours(pixels),
                "cls": lambda alone=alone, pixels=pixels: alone(pixels),
                "transformers": lambda theirs=theirs, values=values: theirs(values),
            }
            seconds = {key: median(value) / batch for key, value in interleaved(works, rounds, threads).items()}
            found.append(
                {
                    "model": name,
                    "dtype": dtype,
                    "transformers_dtype": peer_dtype,
                    "batch": batch,
                    "threads": threads,
                    "ours_ms": seconds["ours"] * 1e3,
                    "transformers_ms": seconds["transformers"] * 1e3,
                    "ratio": seconds["transformers"] / seconds["ours"],
                    "cls_ms": seconds["cls"] * 1e3,
                    "cls_ratio": seconds["transformers"] / seconds["cls"],
                    "ours_gflop_per_s": gflop / seconds["ours"],
                }
            )
            print(found[-1], flush=True)
    return found


def compiled(name: str, rounds: int) -> dict[str, Any]:
    """What torch.compile with frozen weights would give in float32 on one thread, beside ours; batch 4."""
    from torch._inductor import config

    from pipeline.models import inspect_model, load_model

    torch.set_num_threads(1)
    info = inspect_model(str(make_model(Path(tempfile.gettempdir()) / f"patchstream-{name}", name)))
    pixels = torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8)
    ours, plain = load_model(info).trunk, load_model(info, packed=False).trunk
    with torch.no_grad(), config.patch(freezing=True):
        theirs = torch.compile(plain, dynamic=False)
        started = time.perf_counter()
        theirs(pixels)
        compile_s = time.perf_counter() - started
        works: dict[str, Callable[[], Any]] = {"ours": lambda: ours(pixels), "compiled": lambda: theirs(pixels)}
        seconds = {key: median(value) / len(pixels) for key, value in interleaved(works, rounds, 1).items()}
    return {"model": name, "compile_s": compile_s, **{f"{key}_ms": value * 1e3 for key, value in seconds.items()}}


def decode(photos: list[Path], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds for one photo, by size and method; median over photos of the least time of the rounds."""
    from decode import measure
    from PIL import Image

    from pipeline.images.formats import prepare_process
    from pipeline.images.limits import steady_memory
    from schemas.preprocessing import Preprocessing

    prepare_process()
    steady_memory()
    found = []
    for side in SIDES:
        times: dict[str, list[float]] = {}
        for photo in photos[:8]:
            data = io.BytesIO()
            with Image.open(photo) as image:
                image.convert("RGB").resize(side, Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
            shortest, _ = measure(data.getvalue(), Preprocessing(resize=(224, 224)), rounds)
            for method, value in shortest.items():
                times.setdefault(method, []).append(value)
        found.append({"width": side[0], "height": side[1], "ms": {key: median(value) for key, value in times.items()}})
    return found


def write_part(rounds: int) -> dict[str, float]:
    """ROWS rows with CLS and pooled of 768 floats: seconds on a CPU and MB/s."""
    import fsspec
    import pyarrow as pa

    from pipeline.sinks.parts import write_part as put
    from schemas.tables import feature_field

    values = np.random.default_rng(0).standard_normal(ROWS * 768, np.float32)
    field = feature_field("cls", 768, pa.float32())
    column = pa.FixedSizeListArray.from_arrays(pa.array(values), type=field.type)
    uris = pa.array([f"s3://bucket/photos/{row:09d}.jpg" for row in range(ROWS)])
    table = pa.table({"row": pa.array(range(ROWS), pa.int64()), "uri": uris, "cls": column, "pooled": column})
    with tempfile.TemporaryDirectory() as folder:
        seconds = cpu_seconds(lambda: put(fsspec.filesystem("file"), folder, "images", table, b"{}"), rounds, 1)
    return {"rows": ROWS, "seconds": seconds, "mb_per_s": table.nbytes / seconds / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--models", nargs="+", default=["vit-base", "beit-large"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", default=["products", "memory", "forward", "decode", "write"])
    parser.add_argument("--json")
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "ceilings", "environment": environment()}
    if "products" in options.parts:
        result["product_gflop_per_s"], result["product_packed"] = products(options.dtypes, options.rounds, 1), True
    if "memory" in options.parts:
        result["copy_gb_per_s"] = memory(options.rounds)
    if "write" in options.parts:
        result["write"] = write_part(options.rounds)
    if "forward" in options.parts:
        result["forward"] = [
            row
            for threads in options.threads
            for name in options.models
            for row in forward(name, options.dtypes, options.batches, options.rounds, threads)
        ]
    if "compiled" in options.parts:
        result["compiled"] = compiled(options.models[0], options.rounds)
    if "decode" in options.parts:  # last: the decoders' malloc, which is for the whole process, slows a forward pass
        photos = sorted(path for path in options.photos.iterdir() if path.is_file())
        result["decode"] = decode(photos, options.rounds)
    write(options.json, result)


if __name__ == "__main__":
    main()
