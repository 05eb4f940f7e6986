"""Text towers: a transformer over tokens, from CLIP, SigLIP and LiT.

Radford et al. (arXiv 2103.00020), Zhai et al. (arXiv 2303.15343, 2111.07991); BERT: Devlin et al. (arXiv 1810.04805).
Texts are few, so this is written for clarity and runs in float32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.layers import ACTIVATIONS, attend
from pipeline.models.text_architecture import TextArchitecture


class TextBlock(nn.Module):
    """A transformer block with its norms before attention and MLP, or behind them as in BERT."""

    def __init__(self, a: TextArchitecture) -> None:
        super().__init__()
        self.heads, self.norm_first, self.activation = a.heads, a.norm_first, ACTIVATIONS[a.activation]
        self.norm1, self.norm2 = nn.LayerNorm(a.width, a.epsilon), nn.LayerNorm(a.width, a.epsilon)
        self.qkv, self.out = nn.Linear(a.width, 3 * a.width), nn.Linear(a.width, a.width)
        self.fc1, self.fc2 = nn.Linear(a.width, a.mlp_width), nn.Linear(a.mlp_width, a.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` (B or 1, 1, T or 1, T) is True where a token may be seen."""
        if self.norm_first:
            x = x + self.attention(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.mlp(x))  # type: ignore[no-any-return]

    def attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.out(attend(self.qkv(x), self.heads, mask))  # type: ignore[no-any-return]

    def mlp(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))  # type: ignore[no-any-return]


class TextTower(nn.Module):
    """Token ids (B, T) → embeddings (B, E) of length 1, in float32."""

    def __init__(self, a: TextArchitecture) -> None:
        super().__init__()
        self.a = a
        self.tokens = nn.Parameter(torch.empty(a.vocabulary, a.width))
        self.positions = nn.Parameter(torch.empty(a.position_rows, a.width))
        self.segments = nn.Parameter(torch.empty(a.segments, a.width)) if a.segments else None
        self.norm = nn.LayerNorm(a.width, a.epsilon)
        self.blocks: nn.ModuleList = nn.ModuleList(TextBlock(a) for _ in range(a.depth))
        projected = a.projection_width > 0
        self.projection = nn.Linear(a.width, a.projection_width, a.projection_bias) if projected else nn.Identity()

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.tokens) + self.positions[: ids.shape[1]]  # (B, T, D)
        if self.segments is not None:
            x = x + self.segments[0]
        if not self.a.norm_first:
            x = self.norm(x)
        mask = self.mask(ids)
        for block in self.blocks:
            x = block(x, mask)
        if self.a.norm_first:
            x = self.norm(x)
        return F.normalize(self.projection(x[torch.arange(len(ids)), self.position(ids)]), dim=1)

    def mask(self, ids: Tensor) -> Tensor | None:
        """Which tokens are seen: those up to oneself, those that are no padding, or all."""
        if self.a.causal:
            return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
        return (ids != 0)[:, None, None, :] if self.a.masked else None

    def position(self, ids: Tensor) -> Tensor:
        """Where the embedding of each text is read (B,)."""
        if self.a.read == "end":
            return ids.argmax(1) if self.a.end_token is None else (ids == self.a.end_token).int().argmax(1)
        return torch.full((len(ids),), 0 if self.a.read == "first" else ids.shape[1] - 1)
