"""How good a classifier's probabilities are: accuracy, calibration, confusion."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.retrieval.arrays import Floats, Ints

_BINS = 15


@dataclass(frozen=True)
class Scores:
    """`confusion` (C, C), true classes down, predicted across; the rest follows from it and the probabilities."""

    confusion: NDArray[np.int64]
    calibration_error: float
    log_loss: float

    @property
    def accuracy(self) -> float:
        """Share of all examples that are labelled right."""
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    def describe(self, classes: list[str]) -> dict[str, Any]:
        """For JSON: overall, and for each class that has examples."""
        counts = self.confusion.sum(axis=1)
        per_class = {
            name: {"accuracy": float(self.confusion[code, code] / counts[code]), "examples": int(counts[code])}
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


def score(probabilities: Floats, codes: Ints) -> Scores:
    """Compare `probabilities` (n, C) with the true `codes` (n,)."""
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    confusion = np.bincount(codes * classes + predicted, minlength=classes**2).reshape(classes, classes)
    truth = probabilities[np.arange(len(codes)), codes].astype(np.float64)
    error = calibration_error(probabilities.max(axis=1), predicted == codes)
    return Scores(confusion, error, float(-np.log(np.maximum(truth, 1e-12)).mean()))


def calibration_error(confidence: Floats, right: NDArray[np.bool_]) -> float:
    """Expected calibration error over 15 equal bins of confidence (Guo et al. 2017), from 0 to 1."""
    number = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    counts = np.bincount(number, minlength=_BINS)
    gaps = np.abs(
        np.bincount(number, right.astype(np.float64), minlength=_BINS)
        - np.bincount(number, confidence.astype(np.float64), minlength=_BINS)
    )
    return float(gaps.sum() / max(1, counts.sum()))
