"""L2-regularised multinomial logistic regression by L-BFGS, reading the vectors a chunk at a time.

The objective is scikit-learn's, C · Σ loss + ½‖W‖² with the bias free, on features that were centred and divided by
one number, their root mean variance. That changes what a C means, not what can be learned: the classifier is given back
for the features as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.retrieval.arrays import Floats, Ints
from pipeline.retrieval.labels import Labelled
from pipeline.retrieval.matrix import Matrix

if TYPE_CHECKING:
    import torch

_ROUNDS = 200
_IN_MEMORY_BYTES = 3 * 1024**3 // 2


@dataclass(frozen=True)
class Linear:
    """Logits = vectors @ weight.T + bias; weight (C, D), bias (C,), both float32."""

    weight: Floats
    bias: Floats

    def logits(self, vectors: Floats) -> Floats:
        """(n, C) of `vectors` (n, D)."""
        found: Floats = vectors @ self.weight.T + self.bias
        return found

    def sharpened(self, factor: float) -> "Linear":
        """The same predictions, with logits `factor` times as large."""
        return Linear(self.weight * np.float32(factor), self.bias * np.float32(factor))

    def probabilities(self, vectors: Floats) -> Floats:
        """Softmax of the logits, (n, C)."""
        return softmax(self.logits(vectors))


def softmax(logits: Floats) -> Floats:
    """Probabilities (n, C), in the place of `logits` (n, C)."""
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return logits


class TrainingSet:
    """Vectors and codes of labelled rows; kept in memory up to 1.5 GiB, else read from the matrix in every pass."""

    def __init__(self, matrix: Matrix, labelled: Labelled) -> None:
        self._matrix = matrix
        self._positions = labelled.positions
        self.codes = labelled.codes
        self.classes = len(labelled.classes)
        small = 4 * matrix.dim * len(self.codes) <= _IN_MEMORY_BYTES
        self._vectors = _gather(matrix, self._positions) if small else None
        self.mean, self.scale = self._moments()

    def __len__(self) -> int:
        return len(self.codes)

    def chunks(self) -> Iterator[tuple[Floats, Ints]]:
        """Vectors (n, D) and codes (n,)."""
        step = self._matrix.chunk_rows_for(self.classes)
        if self._vectors is not None:
            for start in range(0, len(self), step):
                yield self._vectors[start : start + step], self.codes[start : start + step]
            return
        done = 0
        for at, vectors in self._matrix.chunks(self._positions, step, release=True):
            yield vectors, self.codes[done : done + len(at)]
            done += len(at)

    def _moments(self) -> tuple[NDArray[np.float64], float]:
        total, squares = np.zeros(self._matrix.dim), np.zeros(self._matrix.dim)
        for vectors, _ in self.chunks():
            total += vectors.sum(axis=0, dtype=np.float64)
            squares += np.einsum("ij,ij->j", vectors, vectors, dtype=np.float64)
        mean = total / len(self)
        variance = float(np.mean(squares / len(self) - mean**2))
        return mean, float(np.sqrt(variance)) if variance > 0 else 1.0


def _gather(matrix: Matrix, positions: Ints) -> Floats:
    vectors = np.empty((len(positions), matrix.dim), np.float32)
    done = 0
    for at, block in matrix.chunks(positions, release=True):
        vectors[done : done + len(at)] = block
        done += len(at)
    return vectors


def fit_logistic(data: TrainingSet, strength: float, start: Linear | None = None) -> Linear:
    """The classifier for C = `strength`, from `start` if given; at most 200 rounds."""
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    shape = (data.classes, len(data.mean) + 1)
    initial = np.zeros(shape) if start is None else _scaled(start, data)
    # The optimiser's own vectors are short: threads there only wait. The products in the objective are torch's.
    with threadpool_limits(1, user_api="blas"):
        found = minimize(
            _objective,
            initial.ravel(),
            args=(data, strength),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": _ROUNDS, "gtol": 1e-5, "ftol": 1e-9},
        )
    return _unscaled(found.x.reshape(shape), data)


def _scaled(linear: Linear, data: TrainingSet) -> NDArray[np.float64]:
    weight = linear.weight.astype(np.float64)
    return np.column_stack([weight * data.scale, linear.bias + weight @ data.mean])


def _unscaled(parameters: NDArray[np.float64], data: TrainingSet) -> Linear:
    weight = parameters[:, :-1] / data.scale
    bias = parameters[:, -1] - weight @ data.mean
    return Linear(weight.astype(np.float32), bias.astype(np.float32))


def _objective(flat: NDArray[np.float64], data: TrainingSet, strength: float) -> tuple[float, NDArray[np.float64]]:
    """Loss and gradient, divided by C·n so that tolerances mean the same for all sizes."""
    import torch

    parameters = flat.reshape(data.classes, -1)
    linear = _unscaled(parameters, data)
    weight, bias = torch.from_numpy(linear.weight), torch.from_numpy(linear.bias)
    loss, towards, sums = 0.0, np.zeros(linear.weight.shape), np.zeros(data.classes)
    for vectors, codes in data.chunks():
        part = _chunk_gradient(torch.from_numpy(vectors), torch.from_numpy(codes), weight, bias)
        loss, sums = loss + part[0], sums + part[2]
        towards += part[1]
    gradient = np.column_stack([(towards - np.outer(sums, data.mean)) / data.scale, sums]) / len(data)
    penalty = 1 / (strength * len(data))
    gradient[:, :-1] += penalty * parameters[:, :-1]
    return loss / len(data) + 0.5 * penalty * float((parameters[:, :-1] ** 2).sum()), gradient.ravel()


def _chunk_gradient(
    vectors: "torch.Tensor", codes: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor"
) -> tuple[float, Any, Any]:
    import torch

    logs = torch.log_softmax(torch.addmm(bias, vectors, weight.T), dim=1)  # (n, C)
    at = torch.arange(len(codes))
    loss = -float(logs[at, codes].double().sum())
    errors = logs.exp_()
    errors[at, codes] -= 1
    return loss, (errors.T @ vectors).numpy(), errors.double().sum(0).numpy()
