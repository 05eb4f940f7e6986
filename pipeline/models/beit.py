"""BEiT: Bao et al., "BEiT: BERT Pre-Training of Image Transformers" (arXiv 2106.08254).

A ViT whose attention scores get a learned bias by the offset between two patches, from one table that all blocks
share or from one for each block, and in most checkpoints without absolute positions. The tables are looked up once,
when a checkpoint is loaded.
"""

import torch
from torch import Tensor, nn

from pipeline.models.architecture import Architecture
from pipeline.models.layers import Block, PatchEmbedding, blocks_for

BIAS_ALIGNMENT = 8


class Beit(nn.Module):
    """uint8 pixels (B, H, W, 3) → last hidden state (B, T, D) in float32; T = 1 + patches.

    `relative_bias` holds one (1, heads, T, T') tensor for all blocks or one for each. T' is T rounded up to a
    multiple of 8, the row stride that the fused attention kernels want.
    """

    def __init__(self, a: Architecture, grid: tuple[int, int]) -> None:
        super().__init__()
        tables = {"none": 0, "shared": 1, "each": a.depth}[a.relative_positions]
        self.token_count = a.prefix_tokens + grid[0] * grid[1]
        stride = -(-self.token_count // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
        bias_shape = (1, a.heads, self.token_count, stride)
        self.patch = PatchEmbedding(a.patch_size, a.width)
        self.prefix = nn.Parameter(torch.empty(1, a.prefix_tokens, a.width))
        self.positions = nn.Parameter(torch.empty(1, grid[0] * grid[1], a.width))
        self.relative_bias = nn.ParameterList(torch.empty(bias_shape) for _ in range(tables))
        self.blocks: nn.ModuleList = nn.ModuleList(Block(a) for _ in range(a.depth))
        self.norm = nn.LayerNorm(a.width, a.epsilon) if a.final_norm else nn.Identity()
        self.prefix_block: nn.Module | None = None  # of `prefix.py`, in place of the last block

    def forward(self, pixels: Tensor, whole: bool = True) -> Tensor:
        """Without `whole`, only the prefix tokens (B, P, D), where `prefix_block` is set."""
        patches = self.patch(pixels) + self.positions  # (B, N, D)
        x = torch.cat([self.prefix.expand(len(pixels), -1, -1), patches], dim=1)  # (B, T, D)
        biases = [bias[..., : self.token_count] for bias in self.relative_bias] or [None]
        for i, block in enumerate(blocks_for(self.blocks, self.prefix_block, whole)):
            x = block(x, biases[i % len(biases)])
        return self.norm(x.float())  # type: ignore[no-any-return]


def relative_index(grid: tuple[int, int]) -> Tensor:
    """Row of the relative position table for each (query, key) pair of tokens: int64 (T, T), token 0 being CLS.

    Offsets (down, across) are counted row by row over a (2·rows − 1) × (2·columns − 1) window; the last three rows of
    the table are CLS → patch, patch → CLS and CLS → CLS.
    """
    rows, columns = grid
    window = (2 * rows - 1) * (2 * columns - 1)
    down = torch.arange(rows).repeat_interleave(columns)  # (N,)
    across = torch.arange(columns).repeat(rows)  # (N,)
    offsets = (down[:, None] - down + rows - 1) * (2 * columns - 1) + (across[:, None] - across + columns - 1)
    index = torch.empty(1 + rows * columns, 1 + rows * columns, dtype=torch.int64)
    index[1:, 1:] = offsets
    index[0, 1:] = window
    index[1:, 0] = window + 1
    index[0, 0] = window + 2
    return index


def relative_bias(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bias (1, heads, T, T') for a table (rows, heads) of the same grid; the columns past T are zero."""
    index = relative_index(grid)
    tokens = len(index)
    stride = -(-tokens // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
    bias = table.new_zeros(1, table.shape[1], tokens, stride)
    bias[..., :tokens] = table[index].permute(2, 0, 1)
    return bias
