"""Numbers into bars: what a histogram shows and how its bins are cut."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from schemas.attempt import AttemptRecord, StageSeconds

_SINGLE_VALUES = 8
_SIDE_EDGES = [0, 32, *(edge << octave for octave in range(11) for edge in (48, 64)), 1 << 17]


@dataclass(frozen=True)
class Bar:
    """One bar. `share` is its count over all, `width` its length in percent of the longest."""

    label: str
    count: int
    share: float
    width: float


def bars(counts: Sequence[tuple[str, int]], total: int | None = None) -> list[Bar]:
    """Bars in the order given; `total` is what shares refer to, by default the sum."""
    whole = sum(count for _, count in counts) if total is None else total
    longest = max((count for _, count in counts), default=0)
    return [Bar(label, n, n / whole if whole else 0.0, 100 * n / longest if longest else 0.0) for label, n in counts]


def side_bars(sides: NDArray[np.int64]) -> list[Bar]:
    """Histogram of the longer side in pixels: single values where there are few, else two bins an octave."""
    values = np.flatnonzero(sides)
    if len(values) <= _SINGLE_VALUES:
        return bars([(f"{value} px", int(sides[value])) for value in values])
    counts = [(f"{low}–{high - 1} px", int(sides[low:high].sum())) for low, high in pairwise(_SIDE_EDGES)]
    filled = [index for index, (_, count) in enumerate(counts) if count]
    return bars(counts[filled[0] : filled[-1] + 1])


def score_bars(scores: NDArray[np.float32]) -> list[Bar]:
    """Histogram of the scores of first labels, ten bins from 0 to 1."""
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        return []
    counts, _ = np.histogram(finite.clip(0, 1), bins=10, range=(0, 1))
    return bars([(f"{low / 10:.1f}–{(low + 1) / 10:.1f}", int(count)) for low, count in enumerate(counts)])


def counter_bars(counts: Mapping[str, int], most: int) -> list[Bar]:
    """The `most` frequent, longest first, and one line for the rest."""
    ordered = sorted(((name, n) for name, n in counts.items() if n), key=lambda item: (-item[1], item[0]))
    return most_frequent(ordered, most, "more")


def most_frequent(ordered: Sequence[tuple[str, int]], most: int, others: str) -> list[Bar]:
    """The first `most` of counts in falling order; the rest is a line without a bar, which would dwarf the others."""
    total = sum(count for _, count in ordered)
    rest = sum(count for _, count in ordered[most:])
    line = [Bar(f"{len(ordered) - most} {others}", rest, rest / total, 0.0)] if rest else []
    return [*bars(ordered[:most], total), *line]


@dataclass(frozen=True)
class StageTime:
    """Seconds of work in one stage over all workers and attempts; `start` and `width` in percent of all stages."""

    name: str
    seconds: float
    start: float
    width: float


def stage_times(attempts: Sequence[AttemptRecord]) -> list[StageTime]:
    """Work by stage, in the order of the flow; empty where no attempt has recorded any."""
    names = list(StageSeconds.model_fields)
    seconds = {name: sum(float(getattr(item.stage_seconds, name)) for item in attempts) for name in names}
    total = sum(seconds.values())
    times, start = [], 0.0
    for name in names if total > 0 else []:
        width = 100 * seconds[name] / total
        times.append(StageTime(name, seconds[name], start, width))
        start += width
    return times
