"""Exact nearest neighbours by a streamed matrix product: every vector is read once, at memory speed."""

import warnings
from typing import TYPE_CHECKING

import numpy as np

from pipeline.retrieval.arrays import Floats, Ints, Preparation
from pipeline.retrieval.matrix import Matrix
from schemas.errors import SpecError

if TYPE_CHECKING:
    import torch


_GROUP_ROWS = 256
_VIEW_BYTES = 256 * 1024 * 1024


def check_device(device: str) -> None:
    """Raise SpecError unless `device` is `cpu`, or `cuda` where there is one."""
    if device not in ("cpu", "cuda"):
        raise SpecError(f"--device {device}: choose cpu or cuda")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SpecError("--device cuda: torch finds no GPU on this machine; leave it out to search on the CPU")


def top_k(
    matrix: Matrix,
    queries: Floats,
    k: int,
    *,
    positions: Ints | None = None,
    prepare: Preparation | None = None,
    device: str = "cpu",
    release: bool = False,
) -> tuple[Floats, Ints]:
    """Scores and positions (Q, k) of the k best for each of `queries` (Q, D), best first.

    Of rows that score alike, such as copies of one picture, any may be found, in any order.
    `queries` are prepared already; `prepare` says what to do to the matrix (default: scale to unit length, so that
    scores are cosines). `positions` (ascending) restricts the search. With fewer than k candidates, k shrinks.
    With `release` the matrix does not stay in memory, which is slower.
    """
    import torch

    prepare = prepare or Preparation()
    wanted = np.flatnonzero(matrix.usable) if positions is None else positions[matrix.usable[positions]]
    k = min(k, len(wanted))
    best_scores = np.empty((len(queries), 0), np.float32)
    best_at = np.empty((len(queries), 0), np.int64)
    if k == 0:
        return best_scores, best_at
    weights = torch.from_numpy(np.ascontiguousarray(queries.T)).to(device)  # (D, Q)
    # Views cost nothing, so they may be large: each product wakes all cores and waits for the last of them.
    rows = None if release or not _late(prepare) else _VIEW_BYTES // (4 * matrix.dim)
    for at, vectors in matrix.chunks(wanted, rows, release=release):
        found = _chunk_top(matrix, at, vectors, weights, k, prepare, device)
        best_scores, best_at = _merge(best_scores, best_at, found[0], at[found[1]], k)
    return best_scores, best_at


def _late(prepare: Preparation) -> bool:
    """Whether scores can be scaled in place of the vectors."""
    return prepare.normalise and prepare.mean is None


def _chunk_top(
    matrix: Matrix, at: Ints, vectors: Floats, weights: "torch.Tensor", k: int, prepare: Preparation, device: str
) -> tuple[Floats, Ints]:
    import torch

    # Scaling the n×Q scores by the known lengths saves a scaled copy of the n×D vectors.
    late = _late(prepare)
    with warnings.catch_warnings():
        # Views of the map are read-only, which torch warns of; nothing here writes to them.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        block = torch.from_numpy(vectors if late else prepare.apply(vectors)).to(device)
    scores = block @ weights if weights.shape[1] > 1 else torch.mv(block, weights[:, 0])[:, None]  # (n, Q)
    if late:
        consecutive = at[-1] - at[0] + 1 == len(at)
        norms = matrix.norms[at[0] : at[-1] + 1] if consecutive else matrix.norms[at]
        scores /= torch.from_numpy(norms).to(device)[:, None]
    values, places = _best(scores, min(k, len(at)))
    return values.cpu().numpy(), places.cpu().numpy()


def _best(scores: "torch.Tensor", k: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Values and places (Q, k) of the k largest in each column of `scores` (n, Q).

    They lie in the k groups of rows with the largest maxima, and maxima are taken at memory speed where a selection
    over all rows is not.
    """
    import torch

    n, columns = scores.shape
    groups = n // _GROUP_ROWS
    if groups < 4 * k:
        found = torch.topk(scores.T, k, dim=1)
        return found.values, found.indices
    maxima = scores[: groups * _GROUP_ROWS].view(groups, _GROUP_ROWS, columns).amax(dim=1)  # (groups, Q)
    chosen = torch.topk(maxima.T, k, dim=1).indices * _GROUP_ROWS  # (Q, k), first rows
    within = torch.arange(_GROUP_ROWS, device=scores.device)
    beyond = torch.arange(groups * _GROUP_ROWS, n, device=scores.device).expand(columns, -1)
    rows = torch.cat([(chosen[:, :, None] + within).flatten(1), beyond], dim=1)
    found = torch.topk(scores[rows, torch.arange(columns, device=scores.device)[:, None]], k, dim=1)
    return found.values, rows.gather(1, found.indices)


def _merge(scores: Floats, at: Ints, more: Floats, more_at: Ints, k: int) -> tuple[Floats, Ints]:
    scores, at = np.concatenate([scores, more], axis=1), np.concatenate([at, more_at], axis=1)
    order = np.lexsort((at, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(at, order, 1)
