"""What a GPU does with our networks, against what it can do: one command, under eight minutes, needs torch and numpy.

    python benchmarks/gpu/run.py [--minutes 6] [--models ViT-L/16 …] [--json F]          (from the repository's root)
    python benchmarks/gpu/run.py --tiny                                                  (small sizes, also on a CPU)

In this order, so that whatever time allows is in the result, which is stored after each row: ceilings (large matrix
products by precision, copies on the device and to and from it); images/s of the first network, at the largest batch
first; the products and the attention of one of its blocks; images/s of the others; the large product again.
`model_only`: the forward pass on pixels that lie on the device. `end_to_end`: from pixels in the host's memory to
features in the host's memory, in eight calls of as many images as an actor gets, two of them on their way at once, as
in an actor; `one_call`: a single one, whose first and last copies lie open. `ceiling_share`: the floating-point
operations of the forward pass over the large product in the same precision. `least_cosine`: of the code that was timed
to the network called directly in the same precision. Where it is too low, or where that network is too far from
float32, a line stands in `wrong`, and the exit code is 1, as it is where there is not one rate. Weights are random,
sizes published; torch 2.6 or later.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what all benchmarks share
sys.path.insert(0, str(Path(__file__).resolve().parent))

from device import (
    SIZES,
    TINY_SIZES,
    Bench,
    attention_kernels,
    block_products,
    ceiling_again,
    ceilings,
    environment,
)
from networks import Weights, networks, weights
from rates import LEAST, LEAST_TO_FLOAT32, Subject

from pipeline.models.architecture import Architecture
from pipeline.models.cost import forward_flop
from pipeline.models.gpu import Compiled, has_compiler
from pipeline.predictors.torch_runner import describe_error

MEASURE_S = 2.0
MEASURES = {
    "ceilings": ceilings,
    "products": block_products,
    "attention": attention_kernels,
    "ceiling_at_the_end": ceiling_again,
}
LEFT_OUT = ("left_out", "wrong")


class Step(NamedTuple):
    """One network in one precision at these batch sizes."""

    name: str
    dtype: str
    compiled: Compiled
    batches: tuple[int, ...]
    packed: bool = True

    def __str__(self) -> str:
        return f"{self.name} {self.kind}"

    @property
    def kind(self) -> str:
        compiled = "" if self.compiled == "nothing" else f", {self.compiled} compiled"
        return self.dtype + compiled + ("" if self.packed else ", plain layers")


def steps(names: Sequence[str], batches: Sequence[int], *, compiler: bool) -> tuple[list[Step], list[Step]]:
    """Those of the first network and those of the others: the largest batch in each precision, then the smaller ones.
    The first one also in plain layers, to see what ours gain. Without a compiler float8 runs as it is."""
    largest, *smaller = sorted(batches, reverse=True)
    kinds: list[tuple[str, Compiled]] = [("bfloat16", "nothing"), ("float8", "blocks" if compiler else "nothing")]
    kinds += [("bfloat16", "trunk"), ("float8", "trunk")] if compiler else []
    first, *others = names

    def of(some: Sequence[str]) -> list[Step]:
        found = [Step(name, *kind, (largest,)) for kind in kinds for name in some]
        return found + [Step(name, "bfloat16", "nothing", tuple(smaller)) for name in some if smaller]

    plain = Step(first, "bfloat16", "nothing", (largest,), packed=False)
    packed, *rest = of([first])
    return [packed, plain, *rest], of(others)


class Report:
    """The result: printed as it comes, and stored each time, so that a run that is cut short has its figures."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.found: dict[str, Any] = {"benchmark": "gpu", "environment": {}, "left_out": [], "wrong": []}
        self.found |= {kind: {} for kind in MEASURES} | {"correctness": [], "rates": []}

    def add(self, kind: str, what: Any) -> None:
        """A text to `left_out` or `wrong`, a row to `correctness` or `rates`."""
        self.found[kind].append(what)
        if kind in LEFT_OUT:
            print(f"{kind.replace('_', ' ')}: {what}", flush=True)
        elif kind == "rates":
            show(what)
        self.save()

    def add_error(self, name: str, error: Exception) -> None:
        """To `left_out`, with what lies beneath it; where it was raised goes to stderr alone."""
        traceback.print_exception(error)
        self.add("left_out", f"{name}: {describe_error(error)}")

    def save(self) -> None:
        if self.path:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            Path(self.path).write_text(json.dumps(self.found, indent=1) + "\n")


def measure_device(kinds: Sequence[str], bench: Bench, report: Report, tiny: bool) -> None:
    for kind in kinds:
        try:
            report.found[kind] = MEASURES[kind](bench, TINY_SIZES if tiny else SIZES)
        except Exception as error:  # noqa: BLE001  it must not cost the figures behind it
            report.add_error(kind, error)
            continue
        print(json.dumps({kind: report.found[kind]}, indent=1), flush=True)
        flat = report.found[kind].items() if kind != "products" else [
            (f"{name} {dtype}", value) for name, row in report.found[kind].items() for dtype, value in row.items()
        ]  # fmt: skip
        for name, value in flat:
            if isinstance(value, str):
                report.add("left_out", f"{kind}, {name}: {value}")
    report.save()


def measure(step: Step, subject: Subject, report: Report, bench: Bench) -> None:
    """One network in one precision at every batch size."""
    known = {(row["model"], row["dtype"]) for row in report.found["correctness"]}
    if (step.name, step.dtype) not in known:
        found = {"model": step.name, "dtype": step.dtype, **subject.correctness}
        report.add("correctness", found)
        if not all(cosine >= LEAST_TO_FLOAT32[step.dtype] for cosine in subject.correctness.values()):
            report.add("wrong", f"{step}: {found}, at least {LEAST_TO_FLOAT32[step.dtype]} to float32 was expected")
    for batch in step.batches:
        if bench.late(compiled=step.compiled != "nothing" and bench.cuda):
            report.add("left_out", f"{step} batch {batch}: time is up")
            continue
        try:
            row = subject.rates(batch)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            report.add("left_out", f"{step} batch {batch}: out of memory")
            continue
        row = {"model": step.name, "dtype": step.dtype, "kind": step.kind, "batch": batch, **row}
        report.add("rates", row | against_ceilings(row, subject, report.found["ceilings"]))
        if not row["least_cosine"] >= LEAST[step.dtype]:
            least = f"a cosine of {row['least_cosine']:.5f} to the same network called directly"
            report.add("wrong", f"{step} batch {batch}: {least}, at least {LEAST[step.dtype]} was expected")


def against_ceilings(row: dict[str, Any], subject: Subject, ceilings: dict[str, float | str]) -> dict[str, Any]:
    a = subject.a
    peak, copy = (ceilings.get(key) for key in (f"product_{row['dtype']}_tflops", "copy_to_device_gb_per_s"))
    flop = forward_flop(a, a.trained_size, prefix_only=subject.model.trunk.prefix_block is not None)
    # What a copy of the pixels takes of the time that they compute: below 1 it can hide behind it.
    pixel_gb = 3e-9 * a.trained_size[0] * a.trained_size[1]
    return {
        "ceiling_share": row["model_only"] * flop / 1e12 / peak if isinstance(peak, float) else None,
        "copy_over_compute": pixel_gb / copy * row["model_only"] if isinstance(copy, float) else None,
    }


HEAD = f"{'model':<18}{'precision':<26}{'batch':>6}{'model only':>12}{'end to end':>12}{'share':>7}{'one call':>11}" \
       f"{'ceiling':>9}{'cosine':>9}"  # fmt: skip


def show(row: dict[str, Any]) -> None:
    share = f"{row['ceiling_share']:.0%}" if row["ceiling_share"] else "-"
    print(f"{row['model']:<18}{row['kind']:<26}{row['batch']:>6}{row['model_only']:>12,.1f}{row['end_to_end']:>12,.1f}"
          f"{row['end_to_end_share']:>7.0%}{row['one_call_share']:>11.0%}{share:>9}{row['least_cosine']:>9.5f}",
          flush=True)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=6.0, help="nothing is begun after that (default 6)")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--commit", help="of these files, where they are a copy without .git")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        raise SystemExit("torch sees no GPU here; --tiny runs everything in small sizes")
    unknown = sorted(set(options.models or []) - set(networks(options.tiny)))
    if unknown:
        parser.error(f"--models {' '.join(unknown)}: unknown; there are {', '.join(networks(options.tiny))}")
    return options


def run_steps(todo: list[Step], chosen: dict[str, Architecture], bench: Bench, report: Report) -> None:
    known: dict[str, Weights] = {}
    for step in todo:
        late = bench.late(compiled=step.compiled != "nothing" and bench.cuda)
        if late or (step.dtype == "float8" and not bench.float8):
            report.add("left_out", f"{step}: {'time is up' if late else 'this GPU has no units for it'}")
            continue
        try:
            a = chosen[step.name]
            if step.name not in known:
                known[step.name] = weights(a, bench.device)
            weights_of = known[step.name]
            measure(
                step,
                Subject(a, weights_of, step.dtype, step.compiled, step.packed, max(step.batches), bench),
                report,
                bench,
            )
        except Exception as error:  # noqa: BLE001  one kernel that fails must not cost the figures of the others
            report.add_error(str(step), error)


def main() -> None:
    options = parse()
    bench = Bench(options.device, options.minutes, 0.02 if options.tiny else MEASURE_S)
    report = Report(options.json)
    report.found["environment"] = environment(bench, options.commit)
    chosen = {name: a for name, a in networks(options.tiny).items() if options.models is None or name in options.models}
    compiler = has_compiler() or not bench.cuda
    if not compiler:
        why = "no compiler (gcc or clang) or no Python.h on this machine: nothing is compiled, and float8 is slow"
        report.add("left_out", f"compiled passes: {why}")
    measure_device(["ceilings"], bench, report, options.tiny)
    print(HEAD)
    batches = options.batches or ([2, 4] if options.tiny else [64, 128, 256])
    first, others = steps(list(chosen), batches, compiler=compiler)
    run_steps(first, chosen, bench, report)
    # A kernel that breaks the device breaks all that comes after it, so that these wait for the first network.
    measure_device(["products", "attention"], bench, report, options.tiny)
    run_steps(others, chosen, bench, report)
    measure_device(["ceiling_at_the_end"], bench, report, options.tiny)
    if report.found["wrong"]:
        raise SystemExit("wrong results: " + "; ".join(report.found["wrong"]))
    if not report.found["rates"]:
        raise SystemExit("not one rate: " + "; ".join(report.found["left_out"]))


if __name__ == "__main__":
    main()
