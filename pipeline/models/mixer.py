"""MLP-Mixer: Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision" (arXiv 2105.01601).

Patches go through two MLPs a block: one over the patches, the same for each channel, and one over the channels. There
are no positions, no CLS token and no attention; the number of patches is part of the weights.
"""

import torch
from torch import Tensor, nn

from pipeline.models.architecture import Architecture
from pipeline.models.layers import ACTIVATIONS, PatchEmbedding


class MixerBlock(nn.Module):
    """`x + tokens(norm(x))`, where `tokens` is an MLP along the patches, then `x + channels(norm(x))`."""

    def __init__(self, a: Architecture, tokens: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[a.activation]
        self.norm1 = nn.LayerNorm(a.width, a.epsilon)
        self.token_fc1 = nn.Linear(tokens, a.token_mlp_width)
        self.token_fc2 = nn.Linear(a.token_mlp_width, tokens)
        self.norm2 = nn.LayerNorm(a.width, a.epsilon)
        self.fc1 = nn.Linear(a.width, a.mlp_width)
        self.fc2 = nn.Linear(a.mlp_width, a.width)

    def forward(self, x: Tensor) -> Tensor:
        channels = self.norm1(x).transpose(1, 2)  # (B, D, N)
        x = x + self.token_fc2(self.activation(self.token_fc1(channels))).transpose(1, 2)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """uint8 pixels (B, H, W, 3) → last hidden state (B, N, D) in float32. `positions` holds the patches' bias alone."""

    def __init__(self, a: Architecture, grid: tuple[int, int]) -> None:
        super().__init__()
        tokens = grid[0] * grid[1]
        self.patch = PatchEmbedding(a.patch_size, a.width)
        self.prefix = nn.Parameter(torch.empty(1, 0, a.width))
        self.positions = nn.Parameter(torch.empty(1, tokens, a.width))
        self.blocks: nn.ModuleList = nn.ModuleList(MixerBlock(a, tokens) for _ in range(a.depth))
        self.norm = nn.LayerNorm(a.width, a.epsilon)
        self.prefix_block: nn.Module | None = None  # as the other trunks have it; here every token is read

    def forward(self, pixels: Tensor, whole: bool = True) -> Tensor:
        """Every token is read, so `whole` makes no difference."""
        x = self.patch(pixels) + self.positions  # (B, N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x.float())  # type: ignore[no-any-return]
