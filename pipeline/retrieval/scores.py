"""How good a classifier's probabilities are: accuracy, calibration, confusion."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from pipeline.retrieval.arrays import Floats, Ints

_BINS = 15


@dataclass(frozen=True)
class Scores:
    """`confusion` (C, C), true classes down, predicted across; the rest follows from it and the probabilities.

    It is sparse: of many classes few pairs occur.
    """

    confusion: csr_array
    calibration_error: float
    log_loss: float

    @property
    def accuracy(self) -> float:
        """Share of all examples that are labelled right."""
        return float(self.confusion.trace() / max(1, self.confusion.sum()))

    def describe(self, classes: list[str]) -> dict[str, Any]:
        """For JSON: overall, and for each class that has examples."""
        counts, right = self.confusion.sum(axis=1), self.confusion.diagonal()
        per_class = {
            name: {"accuracy": float(right[code] / counts[code]), "examples": int(counts[code])}
            for code, name in enumerate(classes)
            if counts[code]
        }
        return {
            "accuracy": self.accuracy,
            "mean_class_accuracy": float(np.mean([item["accuracy"] for item in per_class.values()])),
            "expected_calibration_error": self.calibration_error,
            "log_loss": self.log_loss,
            "examples": int(counts.sum()),
            "classes": per_class,
        }


@dataclass(frozen=True)
class Judgement:
    """What the scores need of each example, (n,) each: the true class, the one predicted, and their probabilities."""

    codes: Ints
    predicted: Ints
    truth: Floats
    confidence: Floats

    @property
    def accuracy(self) -> float:
        """Share of all examples that are labelled right."""
        return float(np.mean(self.predicted == self.codes))

    @property
    def log_loss(self) -> float:
        """Mean of −ln of the true class's probability."""
        return float(-np.log(np.maximum(self.truth.astype(np.float64), 1e-12)).mean())

    def scores(self, classes: int) -> Scores:
        """All scores, with the confusion of `classes` classes."""
        # Entries of one place are added up.
        counted = (np.ones(len(self.codes), np.int64), (self.codes, self.predicted))
        error = calibration_error(self.confidence, self.predicted == self.codes)
        return Scores(csr_array(counted, shape=(classes, classes)), error, self.log_loss)


def judge(chunks: Iterable[tuple[Floats, Ints]]) -> Judgement:
    """Compare probabilities (n, C) with the true codes (n,), a chunk at a time; there is at least one chunk."""
    found = [
        (codes, chunk.argmax(axis=1), chunk[np.arange(len(codes)), codes], chunk.max(axis=1)) for chunk, codes in chunks
    ]
    return Judgement(*(np.concatenate(column) for column in zip(*found, strict=True)))


def score(probabilities: Floats, codes: Ints) -> Scores:
    """Compare `probabilities` (n, C) with the true `codes` (n,)."""
    return judge([(probabilities, codes)]).scores(probabilities.shape[1])


def calibration_error(confidence: Floats, right: NDArray[np.bool_]) -> float:
    """Expected calibration error over 15 equal bins of confidence (Guo et al. 2017), from 0 to 1."""
    number = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    counts = np.bincount(number, minlength=_BINS)
    gaps = np.abs(
        np.bincount(number, right.astype(np.float64), minlength=_BINS)
        - np.bincount(number, confidence.astype(np.float64), minlength=_BINS)
    )
    return float(gaps.sum() / max(1, counts.sum()))
