"""Vision Transformer: Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929).

The same network carries DeiT, DINO, DINOv2, MAE and the image towers of CLIP and SigLIP: they differ in the tokens in
front of the patches, in a norm here or there, and in what is read out at the end (`readout.py`).
"""

import torch
from torch import Tensor, nn

from pipeline.models.architecture import Architecture
from pipeline.models.hybrid import HybridEmbedding
from pipeline.models.layers import Block, PatchEmbedding, blocks_for


class ViT(nn.Module):
    """uint8 pixels (B, H, W, 3) → last hidden state (B, T, D) in float32; T = prefix tokens + patches.

    `prefix` holds the CLS, distillation and register tokens with their positions already added.
    """

    def __init__(self, a: Architecture, grid: tuple[int, int]) -> None:
        super().__init__()
        self.patch = HybridEmbedding(a, a.stem) if a.stem else PatchEmbedding(a.patch_size, a.width)
        self.prefix = nn.Parameter(torch.empty(1, a.prefix_tokens, a.width))
        self.positions = nn.Parameter(torch.empty(1, grid[0] * grid[1], a.width))
        self.pre_norm = nn.LayerNorm(a.width, a.epsilon) if a.pre_norm else nn.Identity()
        self.blocks: nn.ModuleList = nn.ModuleList(Block(a) for _ in range(a.depth))
        self.norm = nn.LayerNorm(a.width, a.epsilon) if a.final_norm else nn.Identity()
        self.prefix_block: nn.Module | None = None  # of `prefix.py`, in place of the last block

    def forward(self, pixels: Tensor, whole: bool = True) -> Tensor:
        """Without `whole`, only the prefix tokens (B, P, D), where `prefix_block` is set."""
        patches = self.patch(pixels) + self.positions  # (B, N, D)
        x = torch.cat([self.prefix.expand(len(pixels), -1, -1), patches], dim=1)  # (B, T, D)
        x = self.pre_norm(x)
        for block in blocks_for(self.blocks, self.prefix_block, whole):
            x = block(x)
        return self.norm(x.float())  # type: ignore[no-any-return]
