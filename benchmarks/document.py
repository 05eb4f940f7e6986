"""Writes docs/benchmarks.md from benchmarks/results/*.json.

    python benchmarks/document.py [--check]

Every figure on the page comes from a file; a file of a kind that has no section here is listed at the end. With
`--check` nothing is written, and a page that is not current is an error.
"""

import json
import sys
from pathlib import Path

from sections import SECTIONS
from tables import ROOT, Result, computes_bfloat16

PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"

HEAD = """# How fast it is

Written by `python benchmarks/document.py` from `benchmarks/results/*.json`; do not edit it by hand. The machines of
these figures are shared with other work, so ratios within one run count, not single times.

| question | command |
| --- | --- |
| What will a job do on my machine, and what should I change? | `patchstream benchmark SOURCE --model M` |
| Does the real run then keep to that? | `python benchmarks/preflight.py PHOTOS --model M` |
| What can this machine do at best, and how near is our forward pass? | `python benchmarks/ceilings.py PHOTOS` |
| How do others do on the same photos and weights? | `python benchmarks/peers.py PHOTOS` |
| How close does the whole job come to decode + bare forward? | `python benchmarks/end_to_end.py PHOTOS` |
| How do time and memory grow with the manifest? | `python benchmarks/scale.py` |
| Does a job's memory stay flat? | `python benchmarks/endurance.py PHOTOS` |
| What do search, clusters, duplicates and probes cost at 1,000,000 × 384? | `python benchmarks/retrieval.py` |
| What do listing and updating cost? | `python -m benchmarks.sources --rows 1000000` |
| What does decoding cost, and what does `--decode fast` change? | `python benchmarks/decode.py PHOTOS` |
| What does predicting through a Triton server cost? | `python benchmarks/through_triton.py` |
| What does a GPU do? | `python benchmarks/gpu/run.py` |

`ceilings`, `peers`, `end_to_end`, `endurance` and `through_triton` make their model with transformers:
`pip install -c constraints.txt -e '.[peers]'`.
"""

NO_GPU = """## GPUs

**There are no GPU figures yet.** No machine with a GPU could be reached while this was written. The code for GPUs (two
page-locked buffers and a copy stream for each direction, CUDA graphs at a fixed batch size, the choice of the attention
kernel, torch.compile for long jobs, float8 products, a batch size found by measurement) has not run on one: its choices
and its arithmetic are tested without. `benchmarks/gpu/run.py` takes less than eight minutes, needs torch and numpy and
compares what it times with plain calls of the same network; its JSON in `benchmarks/results/` becomes this section.
"""


def main() -> None:
    page = compose(load(RESULTS))
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page)
    elif PAGE.read_text() != page:
        raise SystemExit("docs/benchmarks.md is not what the results give; run python benchmarks/document.py")


def load(folder: Path) -> dict[str, Result]:
    """Results by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def compose(results: dict[str, Result]) -> str:
    """The page for `results`."""
    parts = [HEAD, *in_short(results)]
    for kind, section in SECTIONS.items():
        mine = [(name, found) for name, found in results.items() if found.get("benchmark") == kind]
        # What a job takes by itself first.
        mine.sort(key=lambda item: not computes_bfloat16(item[1]))
        parts += [section(name, found) for name, found in mine]
    if not any(found.get("benchmark") == "gpu" for found in results.values()):
        parts.append(NO_GPU)
    others = [name for name, found in results.items() if found.get("benchmark") not in SECTIONS]
    if others:
        parts.append("## Other results\n\n" + "\n".join(f"- `benchmarks/results/{name}`" for name in others) + "\n")
    return "\n".join(parts)


def in_short(results: dict[str, Result]) -> list[str]:
    """What a CPU with bfloat16 units gives, in a line for each run; nothing where none was measured."""
    lines = {"end_to_end": _whole_job, "peers": _over_peers, "ceilings": _over_transformers}
    said = [
        line
        for kind, told in lines.items()
        for name, found in results.items()
        if found.get("benchmark") == kind and computes_bfloat16(found)
        for line in told(name, found)
    ]
    return ["## In short, on a CPU with bfloat16 units\n\n" + "\n".join(said) + "\n"] if said else []


def _whole_job(name: str, found: Result) -> list[str]:
    rounds = ", ".join(f"{item['share']:.0%}" for item in found["rounds"] if "share" in item)
    reached = f"{found['share_of_ideal']:.0%}" + (f" (the rounds: {rounds})" if rounds else "")
    model = found["model"].removeprefix("patchstream-")
    return [f"- A whole job of {model} in {found['dtype']} reaches {reached} of decoding plus bare forward."]


def _over_peers(name: str, found: Result) -> list[str]:
    """A line for ours as it comes and, where that was measured, one for ours in float32 beside others in it."""
    rows = found["results"]
    said = []
    for who in ("patchstream", "patchstream float32"):
        ours = rows.get(who)
        others = {
            peer if row["dtype"] in peer else f"{peer}, {row['dtype']}": row["images_per_s"]
            for peer, row in rows.items()
            if ours and "patchstream" not in peer and (who == "patchstream" or row["dtype"] == ours["dtype"])
        }
        told = ", ".join(f"{ours['images_per_s'] / rate:.1f} ({peer})" for peer, rate in others.items())
        about = f"- Over {found['images']:,} photos, start-up included, ours in"
        if told:
            said.append(f"{about} {ours['dtype']}, times the images/s of others (`{name}`): {told}.")
    return said


def _over_transformers(name: str, found: Result) -> list[str]:
    rows = found.get("forward", [])
    return ["- Bare forward, times transformers: " + ", ".join(_bare(row) for row in rows) + "."] if rows else []


def _bare(row: Result) -> str:
    return f"{row['ratio']:.2f} ({row['model']} in {row['dtype']}, batch {row['batch']})"


if __name__ == "__main__":
    main()
