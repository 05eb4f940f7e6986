"""What the sections of docs/benchmarks.md share: tables, numbers, and where figures come from."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def origin(name: str, found: Result) -> str:
    """Where the figures of a section come from, and what is to be said of that run alone (`note`)."""
    machine = found["environment"]
    where = " in a host with ".join(machine[kind] for kind in ("device", "cpu") if machine.get(kind))
    cores = f", {machine['cores']} cores" if "cores" in machine else ""
    flags = f" ({', '.join(machine['flags'])})" if machine.get("flags") else ""
    note = f"\n{found['note']}\n" if found.get("note") else ""
    return f"`benchmarks/results/{name}`, commit {machine['commit']}: {where}{cores}{flags}.\n{note}"


def computes_bfloat16(found: Result) -> bool:
    """Whether the CPU of these figures has units for it."""
    return bool({"amx_bf16", "avx512_bf16"} & set(found.get("environment", {}).get("flags", [])))


def kind_of_cpu(found: Result) -> str:
    """For titles, where the same was measured on several machines."""
    return "CPU with bfloat16 units" if computes_bfloat16(found) else "CPU without bfloat16 units"


def figure(value: float | str | None, digits: int = 1) -> str:
    """What could not be measured is a text in the results, what there was nothing to measure with is null."""
    return "-" if value is None or isinstance(value, str) else f"{value:,.{digits}f}"
