"""From a checkpoint's tensors (in our names) to the parameters of the network: everything constant is folded in.

Pure functions on dicts. Arithmetic is in float64 or float32, whatever precision the network then runs in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.models.architecture import Architecture
from pipeline.models.beit import relative_bias
from pipeline.models.hybrid import fold_stem
from pipeline.models.positions import resize_grid, resize_relative_table

if TYPE_CHECKING:
    from schemas.preprocessing import Preprocessing

Tensors = Mapping[str, Tensor]
READOUT = (
    *("pooler", "pool_norm", "projection", "attention_pool", "head", "distillation_head"),
    *("token_norm", "token_head"),
)
PIXEL_SHIFT = 128


def fold(tensors: Tensors, a: Architecture, preprocessing: Preprocessing, dtype: torch.dtype) -> dict[str, Tensor]:
    """State dict of `VisionModel`: the trunk in `dtype`; a hybrid's stem, final norm and readout in float32."""
    grid = a.grid(preprocessing.output_size)
    patch, patch_bias = fold_patches(tensors, a, preprocessing)
    prefix, positions = fold_tokens(tensors, a, grid)
    trunk = {**patch, "prefix": prefix, "positions": positions + patch_bias}
    for i, table in enumerate(relative_tables(tensors, a)):
        table = resize_relative_table(table, a.trained_grid, grid, a.table_resize)
        trunk[f"relative_bias.{i}"] = relative_bias(table, grid)
    trunk |= {name: tensor for name, tensor in tensors.items() if name.startswith(("pre_norm.", "blocks."))}
    trunk = {name: tensor for name, tensor in fold_layer_scale(trunk).items() if "relative_table" not in name}
    trunk = {name: t.float() if name.startswith("patch.stem.") else t.to(dtype) for name, t in trunk.items()}
    state = {f"trunk.{name}": tensor for name, tensor in trunk.items()}
    state |= {f"trunk.{name}": tensor.float() for name, tensor in tensors.items() if name.startswith("norm.")}
    state |= {f"readout.{name}": t.float() for name, t in tensors.items() if name.partition(".")[0] in READOUT}
    if a.pool_norm == "made_up":
        state |= {"readout.pool_norm.weight": torch.ones(a.width), "readout.pool_norm.bias": torch.zeros(a.width)}
    return state


def fold_patches(
    tensors: Tensors, a: Architecture, preprocessing: Preprocessing
) -> tuple[dict[str, Tensor], Tensor | float]:
    """Parameters of the patch embedding, normalisation included, and the bias (D,) that joins the positions."""
    if a.stem is None:
        weight, bias = fold_patch_embedding(tensors, preprocessing)
        return {"patch.weight": weight}, bias
    stem = {f"patch.{name}": tensor for name, tensor in fold_stem(tensors, preprocessing).items()}
    return stem, tensors["patch.bias"].float() if a.patch_bias else 0.0


def fold_patch_embedding(tensors: Tensors, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Weight (D, ph·pw·3) on `pixel - 128`, and bias (D,).

    With q = pixel − 128, a normalised value is q · r/s + (128 r − m)/s for rescale r, mean m and std s.
    """
    kernel = tensors["patch.weight"].double()  # (D, 3, ph, pw)
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
    std = torch.tensor(preprocessing.std, dtype=torch.float64)
    rescale = preprocessing.rescale_factor
    weight = kernel * (rescale / std)[:, None, None]
    bias = (kernel.sum(dim=(2, 3)) * (PIXEL_SHIFT * rescale - mean) / std).sum(dim=1)
    if "patch.bias" in tensors:
        bias = bias + tensors["patch.bias"].double()
    return weight.permute(0, 2, 3, 1).flatten(1).float(), bias.float()


def fold_tokens(tensors: Tensors, a: Architecture, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Prefix tokens (1, P, D) with their positions added, and the positions of the patches (1, N, D)."""
    names = ("cls_token", "distillation_token", "registers")
    tokens = [tensors[name].float() for name in names if name in tensors]
    prefix = torch.cat([torch.zeros(1, 0, a.width), *tokens], dim=1)
    patches = torch.zeros(grid[0] * grid[1], a.width)
    if a.positions != "none":
        table = tensors["positions"].float()
        covered = a.positioned_prefix
        patches = resize_grid(table[0, covered:], a.trained_grid, grid, a.position_resize)
        prefix = torch.cat([prefix[:, :covered] + table[:, :covered], prefix[:, covered:]], dim=1)
    return prefix, patches[None]


def relative_tables(tensors: Tensors, a: Architecture) -> list[Tensor]:
    """BEiT's tables in the order of the blocks: none, one shared, or one for each."""
    if a.relative_positions == "shared":
        return [tensors["relative_table"]]
    if a.relative_positions == "each":
        return [tensors[f"blocks.{i}.relative_table"] for i in range(a.depth)]
    return []


def fold_layer_scale(tensors: Tensors) -> dict[str, Tensor]:
    """LayerScale multiplied into the linear layer before it: `scale1` into `out`, `scale2` into `fc2`."""
    folded = dict(tensors)
    for name in tensors:
        block, _, last = name.rpartition(".")
        target = {"scale1": "out", "scale2": "fc2"}.get(last)
        if target is not None:
            scale = folded.pop(name).float()
            folded[f"{block}.{target}.weight"] = tensors[f"{block}.{target}.weight"].float() * scale[:, None]
            folded[f"{block}.{target}.bias"] = tensors[f"{block}.{target}.bias"].float() * scale
    return folded
