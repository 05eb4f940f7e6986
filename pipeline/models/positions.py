"""Bringing learned positions to another grid, as the checkpoint's own library does it."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.models.architecture import Resize, TableResize

# transformers interpolates position embeddings bicubically without antialiasing and BEiT's tables bilinearly; timm uses
# bicubic with antialiasing; google-research zooms with order 1, the corners kept in place.
MODES: dict[Resize | Literal["bilinear"], dict[str, Any]] = {
    "bicubic": {"mode": "bicubic", "align_corners": False},
    "bicubic_antialias": {"mode": "bicubic", "align_corners": False, "antialias": True},
    "bilinear": {"mode": "bilinear", "align_corners": False},
    "bilinear_corners": {"mode": "bilinear", "align_corners": True},
}


def resize_grid(
    values: Tensor, old: tuple[int, int], new: tuple[int, int], how: Resize | Literal["bilinear"]
) -> Tensor:
    """Values (rows·columns, D) on the `old` grid → the same on the `new` grid, in float32."""
    if old == new:
        return values
    image = values.float().T.reshape(1, -1, *old)  # (1, D, rows, columns)
    return F.interpolate(image, size=new, **MODES[how]).flatten(2)[0].T


def resize_relative_table(table: Tensor, old: tuple[int, int], new: tuple[int, int], how: TableResize) -> Tensor:
    """BEiT's table of the `old` grid (rows, heads) → of the `new` grid; the three rows for CLS are kept."""
    if old == new:
        return table
    source, target = [(2 * grid[0] - 1, 2 * grid[1] - 1) for grid in (old, new)]
    if how == "bilinear":
        return torch.cat([resize_grid(table[:-3], source, target, "bilinear"), table[-3:].float()])
    window = table[:-3].double().T.reshape(-1, *source)  # (heads, rows, columns)
    down, across = (_geometric_weights(source[axis], target[axis]) for axis in (0, 1))
    return torch.cat([(down @ window @ across.T).flatten(1).T.float(), table[-3:].float()])


def _geometric_weights(source: int, target: int) -> Tensor:
    """Linear interpolation weights (target, source) between offsets that grow geometrically.

    BEiT's authors and timm put the old offsets at 0, ±1, ±(1 + q), ±(1 + q + q²), … with q such that the last one
    falls on the largest new offset, so that near neighbours keep their resolution.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q ** (source // 2)) / (1 - q) > target // 2:
            high = q
        else:
            low = q
    steps = torch.tensor([q**i for i in range(source // 2)], dtype=torch.float64).cumsum(0)
    points = torch.cat([-steps.flip(0), torch.zeros(1, dtype=torch.float64), steps])  # (source,)
    wanted = torch.arange(-(target // 2), target // 2 + 1, dtype=torch.float64)  # (target,)
    right = torch.searchsorted(points, wanted).clamp(1, source - 1)
    share = ((wanted - points[right - 1]) / (points[right] - points[right - 1])).clamp(0, 1)
    weights = torch.zeros(target, source, dtype=torch.float64)
    weights.scatter_(1, (right - 1)[:, None], (1 - share)[:, None])
    return weights.scatter_add(1, right[:, None], share[:, None])
