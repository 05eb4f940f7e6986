"""A help to choose the threshold of `duplicates`: how many pairs there are around it, and what they look like."""

from dataclasses import dataclass

import numpy as np

from pipeline.retrieval.arrays import Preparation
from pipeline.retrieval.duplicates import check_threshold
from pipeline.retrieval.pairs import near_pairs
from pipeline.retrieval.store import FeatureStore

STEP = 0.01
_STEPS = 5
_EXAMPLES = 4


@dataclass
class Band:
    """Pairs with a cosine in [low, high), up to and with 1 where that is `high`.

    `examples` are (row, row, cosine), a random few of them.
    """

    low: float
    high: float
    pairs: int
    examples: list[tuple[int, int, float]]


def pairs_around(store: FeatureStore, threshold: float, *, feature: str = "cls", seed: int = 0) -> list[Band]:
    """Ten bands of 0.01 around `threshold`, or those of them below 1, highest first.

    Raises SpecError for a threshold outside (0, 1].
    """
    check_threshold(threshold, "--around")
    matrix = store.load(feature)
    bands = _bands(threshold)
    # Copies have a cosine of 1 itself, and a band ends before its upper edge.
    top = np.inf if bands[-1].high == 1 else bands[-1].high
    edges = np.array([*(band.low for band in bands), top], np.float32)
    rng = np.random.default_rng(seed)
    # Each pair draws a number; of each band those with the lowest are shown, so all have the same chance.
    drawn: list[list[tuple[float, tuple[int, int, float]]]] = [[] for _ in bands]
    for found in near_pairs(matrix, np.flatnonzero(matrix.usable), float(edges[0]), Preparation(), store.progress):
        band_of = np.searchsorted(edges, found.score, side="right") - 1
        lots = rng.random(len(found.score))
        for number, band in enumerate(bands):
            inside = np.flatnonzero(band_of == number)
            band.pairs += len(inside)
            if len(inside) > _EXAMPLES:
                inside = inside[np.argpartition(lots[inside], _EXAMPLES)[:_EXAMPLES]]
            for at in inside:
                pair = (int(matrix.rows[found.first[at]]), int(matrix.rows[found.second[at]]), float(found.score[at]))
                drawn[number].append((float(lots[at]), pair))
            drawn[number] = sorted(drawn[number])[:_EXAMPLES]
    for band, kept in zip(bands, drawn, strict=True):
        band.examples = [pair for _, pair in kept]
    return bands[::-1]


def _bands(threshold: float) -> list[Band]:
    """Empty bands, lowest first. Rounded, since sums of hundredths miss 1 by a little."""
    lows = [round(threshold + STEP * step, 6) for step in range(-_STEPS, _STEPS)]
    return [Band(low, min(1.0, round(low + STEP, 6)), 0, []) for low in lows if low < 1]
