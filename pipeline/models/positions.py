"""Bringing learned positions to another grid, as the checkpoint's own library does it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.models.architecture import Resize

# transformers interpolates position embeddings bicubically without antialiasing and BEiT's tables bilinearly; timm uses
# bicubic with antialiasing; google-research zooms with order 1, the corners kept in place.
MODES: dict[Resize, dict[str, Any]] = {
    "bicubic": {"mode": "bicubic", "align_corners": False},
    "bicubic_antialias": {"mode": "bicubic", "align_corners": False, "antialias": True},
    "bilinear": {"mode": "bilinear", "align_corners": False},
    "bilinear_corners": {"mode": "bilinear", "align_corners": True},
}


def resize_grid(values: Tensor, old: tuple[int, int], new: tuple[int, int], how: Resize) -> Tensor:
    """Values (rows·columns, D) on the `old` grid → the same on the `new` grid, in float32."""
    if old == new:
        return values
    image = values.float().T.reshape(1, -1, *old)  # (1, D, rows, columns)
    return F.interpolate(image, size=new, **MODES[how]).flatten(2)[0].T


def resize_relative_table(table: Tensor, old: tuple[int, int], new: tuple[int, int], how: Resize) -> Tensor:
    """BEiT's table of the `old` grid (rows, heads) → of the `new` grid; the three rows for CLS are kept."""
    if old == new:
        return table
    windows = [(2 * grid[0] - 1, 2 * grid[1] - 1) for grid in (old, new)]
    return torch.cat([resize_grid(table[:-3], windows[0], windows[1], how), table[-3:].float()])
