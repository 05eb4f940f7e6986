"""What a GPU does with our networks, against what it can do: one command, under eight minutes, needs torch alone.

    python benchmarks/gpu/run.py [--minutes 7.5] [--models ViT-L/16 …] [--json F]        (from the repository's root)
    python benchmarks/gpu/run.py --tiny                                                  (small sizes, also on a CPU)

In this order, so that whatever time allows is in the result: ceilings (large matrix products by precision, copies on
the device and to and from it), correctness of each precision against float32, then images/s. `model_only`: the forward
pass on pixels that lie on the device. `end_to_end`: from pixels in the host's memory to features in the host's memory,
as an actor does it with pre-decoded input. `ceiling_share`: the floating-point operations of the forward pass over the
large product in the same precision. Weights are random, sizes published.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.models.architecture import Architecture, tensor_shapes
from pipeline.models.assemble import assemble
from pipeline.models.cost import forward_flop
from pipeline.models.gpu import has_compiler, plan_gpu
from pipeline.models.precision import describe_hardware, torch_dtype
from pipeline.models.quantised import quantise_float8, scaled_product
from pipeline.predictors.torch_runner import Runner

MEASURE_S = 2.0
# Precision, and whether compiled; every network in the first before any in the next, should time run out.
PASSES = (("bfloat16", False), ("float8", True), ("bfloat16", True))
LARGE = {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096}
BASE = {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072}
TINY = {"width": 64, "depth": 2, "heads": 2, "mlp_width": 128}


def vit(shape: dict[str, int], side: int) -> Architecture:
    return Architecture("vit", **shape, patch_size=(16, 16), trained_size=(side, side), epsilon=1e-6, pooled="pooler")


def beit(shape: dict[str, int], side: int) -> Architecture:
    return Architecture(
        "beit", **shape, patch_size=(16, 16), trained_size=(side, side), epsilon=1e-6, positions="none",
        relative_positions="shared", layer_scale=True, qkv_bias="all", pooled="layernormed_mean_patch_tokens",
        pool_norm="made_up", final_norm=False,
    )  # fmt: skip


def networks(tiny: bool) -> dict[str, Architecture]:
    if tiny:
        return {"tiny ViT": vit(TINY, 32), "tiny BEiT": beit(TINY, 32)}
    return {
        "ViT-L/16": vit(LARGE, 224),
        "ViT-B/16": vit(BASE, 224),
        "BEiT-L/16": beit(LARGE, 224),
        "ViT-L/16 at 384": vit(LARGE, 384),
    }


def random_tensors(a: Architecture) -> dict[str, torch.Tensor]:
    """Weights that give activations of order one."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in tensor_shapes(a).items():
        values = torch.randn(shape, generator=generator)
        fan_in = int(np.prod(shape[1:]))
        if len(shape) == 1:
            centre = 1.0 if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "scale1", "scale2")) else 0.0
            values = centre + 0.1 * values
        elif "table" in name or "token" in name or name == "positions":
            values *= 0.5
        else:
            values /= fan_in**0.5
        found[name] = values
    return found


class Bench:
    """The device, its clock and the deadline."""

    def __init__(self, device: str, minutes: float, measure_s: float) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.until = time.monotonic() + 60 * minutes
        self.measure_s = measure_s
        self.capability = torch.cuda.get_device_capability() if self.cuda else (9, 0)

    @property
    def late(self) -> bool:
        return time.monotonic() > self.until

    def seconds(self, work: Callable[[], Any]) -> float:
        """Median seconds of one call, each with the device idle before and after."""
        for _ in range(3):
            work()
        self.wait()
        taken: list[float] = []
        while len(taken) < 3 or (sum(taken) < self.measure_s and len(taken) < 200):
            started = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - started)
        return float(np.median(taken))

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def ceilings(bench: Bench, side: int, copy_bytes: int) -> dict[str, float]:
    """TFLOP/s of products of `side`³ and GB/s of copies."""
    found: dict[str, float] = {}
    for name in ("bfloat16", "float32"):
        a, b = (torch.randn(side, side, device=bench.device, dtype=torch_dtype(name)) for _ in range(2))
        found[f"product_{name}_tflops"] = 2e-12 * side**3 / bench.seconds(lambda a=a, b=b: a @ b.t())
    if bench.capability >= (8, 9):
        (a, sa), (b, sb) = (quantise_float8(torch.randn(side, side, device=bench.device)) for _ in range(2))
        seconds = bench.seconds(lambda: scaled_product(a, sa, b.t(), sb.reshape(1, -1), None))
        found["product_float8_tflops"] = 2e-12 * side**3 / seconds
    host = torch.zeros(copy_bytes, dtype=torch.uint8, pin_memory=bench.cuda)
    there, other = (torch.zeros(copy_bytes, dtype=torch.uint8, device=bench.device) for _ in range(2))
    for name, target, source in (("to_device", there, host), ("from_device", host, there), ("on_device", other, there)):
        work = lambda target=target, source=source: target.copy_(source, non_blocking=True)  # noqa: E731
        found[f"copy_{name}_gb_per_s"] = 1e-9 * copy_bytes / bench.seconds(work)
    return found


def network(a: Architecture, tensors: dict[str, torch.Tensor], dtype: str, device: torch.device) -> Any:
    preprocessing = SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3, rescale_factor=1 / 255, output_size=a.trained_size)
    return assemble(tensors, a, preprocessing, dtype=torch_dtype(dtype), device=device, outputs=("cls", "pooled"))


@torch.inference_mode()
def correctness(a: Architecture, tensors: dict[str, torch.Tensor], dtype: str, bench: Bench) -> dict[str, float]:
    """Least cosine of CLS and pooled to those in float32 on the same device."""
    pixels = torch.randint(0, 256, (8, *a.trained_size, 3), dtype=torch.uint8, device=bench.device)
    ours, exact = (network(a, tensors, name, bench.device)(pixels) for name in (dtype, "float32"))
    return {
        name: float(torch.cosine_similarity(getattr(ours, name).float(), getattr(exact, name), dim=1).min())
        for name in ("cls", "pooled")
    }


@torch.inference_mode()
def rates(a: Architecture, model: Any, dtype: str, batch: int, bench: Bench) -> dict[str, float]:
    """Images/s model-only and end to end."""
    plan = plan_gpu(
        describe_hardware(cuda=bench.cuda), dtype, attention_bias=a.relative_positions != "none", work_gflop=0
    )
    attention = plan.attention if bench.cuda else ("FLASH_ATTENTION", "MATH")

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with sdpa_kernel([getattr(SDPBackend, name) for name in attention], set_priority=True):
            outputs = model(pixels)
        return outputs.cls, outputs.pooled

    shape = (*a.trained_size, 3)
    runner = Runner(forward, batch=batch, shape=shape, device=bench.device, graphs=plan.graphs)
    alone = bench.seconds(lambda: runner._compute(0)) / batch
    pixels = np.zeros((8 * batch, *shape), np.uint8)
    whole = bench.seconds(lambda: runner.run(pixels)) / len(pixels)
    return {"model_only": 1 / alone, "end_to_end": 1 / whole, "end_to_end_share": alone / whole}


def measure(
    name: str,
    a: Architecture,
    tensors: dict[str, torch.Tensor],
    how: tuple[str, bool],
    found: dict[str, Any],
    bench: Bench,
    batches: list[int],
) -> None:
    """One network in one precision at every batch size; results go into `found` as they come."""
    dtype, compiled = how
    kind = dtype + (" compiled" if compiled else "")
    unable = compiled and bench.cuda and not has_compiler()
    if bench.late or unable or (dtype == "float8" and bench.capability < (8, 9)):
        found["left_out"].append(f"{name} {kind}")
        return
    if not compiled or dtype == "float8":
        found["correctness"].append({"model": name, "dtype": dtype, **correctness(a, tensors, dtype, bench)})
    model = network(a, tensors, dtype, bench.device)
    if compiled and bench.cuda:
        model.trunk.compile(dynamic=False)
    for batch in batches[-1:] if compiled else batches:
        if bench.late:
            found["left_out"].append(f"{name} {kind} batch {batch}: time is up")
            continue
        try:
            row = rates(a, model, dtype, batch, bench)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            found["left_out"].append(f"{name} {kind} batch {batch}: out of memory")
            continue
        ceiling = found["ceilings"].get(f"product_{dtype}_tflops")
        flop = forward_flop(a, a.trained_size, prefix_only=model.trunk.prefix_block is not None)
        share = row["model_only"] * flop / 1e12 / ceiling if ceiling else None
        # What a copy of the pixels takes of the time that they compute: below 1 it can hide behind it.
        pixel_gb = 3e-9 * a.trained_size[0] * a.trained_size[1]
        row["copy_over_compute"] = pixel_gb / found["ceilings"]["copy_to_device_gb_per_s"] * row["model_only"]
        found["rates"].append(
            {"model": name, "dtype": dtype, "compiled": compiled, "batch": batch, "ceiling_share": share, **row}
        )
        show(found["rates"][-1])


def show(row: dict[str, Any]) -> None:
    kind = row["dtype"] + (" compiled" if row["compiled"] else "")
    share = f"{row['ceiling_share']:.0%}" if row["ceiling_share"] else "-"
    print(f"{row['model']:<18}{kind:<20}{row['batch']:>6}{row['model_only']:>12,.1f}{row['end_to_end']:>12,.1f}"
          f"{share:>8}", flush=True)  # fmt: skip


def environment(bench: Bench) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if bench.cuda else "cpu",
        "capability": list(bench.capability) if bench.cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        raise SystemExit("torch sees no GPU here; --tiny runs everything in small sizes")
    bench = Bench(options.device, options.minutes, 0.02 if options.tiny else MEASURE_S)
    side, copy_bytes = (64, 1 << 20) if options.tiny else (8192, 1 << 30)
    found: dict[str, Any] = {"benchmark": "gpu", "environment": environment(bench), "left_out": []}
    found |= {"ceilings": ceilings(bench, side, copy_bytes), "correctness": [], "rates": []}
    print(json.dumps(found["ceilings"], indent=1))
    print(f"{'model':<18}{'precision':<20}{'batch':>6}{'model only':>12}{'end to end':>12}{'ceiling':>8}")
    batches = options.batches or ([2, 4] if options.tiny else [64, 128, 256])
    chosen = {name: a for name, a in networks(options.tiny).items() if options.models is None or name in options.models}
    tensors = {name: random_tensors(a) for name, a in chosen.items()}
    for how in PASSES:
        for name, architecture in chosen.items():
            try:
                measure(name, architecture, tensors[name], how, found, bench, batches)
            except Exception as error:  # noqa: BLE001  one kernel that fails must not cost the figures of the others
                found["left_out"].append(f"{name} {how[0]}: {type(error).__name__}: {error}"[:500])
                print(found["left_out"][-1], flush=True)
            save(options.json, found)


def save(path: str | None, found: dict[str, Any]) -> None:
    """After each network, so that a run that is cut short has its figures."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
