"""The parts that every network here is built of: patch embedding from uint8, and the pre-norm transformer block."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.architecture import Activation, Architecture


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, the default of flax."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}
IN_PLACE = {
    "gelu": lambda x: torch.ops.aten.gelu_(x),
    "gelu_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "relu": torch.relu_,
}


class PatchEmbedding(nn.Module):
    """uint8 pixels (B, H, W, 3) → patch tokens (B, N, D) by one matrix product.

    Rescaling and normalisation stand in the weight. A pixel goes in as `pixel - 128`: exact in bfloat16 and float16,
    and near zero on average, so that little is lost to cancellation. The bias stands in the position embeddings.
    """

    def __init__(self, patch_size: tuple[int, int], width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(width, patch_size[0] * patch_size[1] * 3))

    def forward(self, pixels: Tensor) -> Tensor:
        b, height, width, _ = pixels.shape
        ph, pw = self.patch_size
        rows, columns = height // ph, width // pw
        # What is no whole patch is left out, as a convolution without padding leaves it out.
        whole = pixels[:, : rows * ph, : columns * pw]
        grid = whole.reshape(b, rows, ph, columns, pw, 3).transpose(2, 3)  # (B, rows, columns, ph, pw, 3)
        patches = grid.reshape(b, rows * columns, ph * pw * 3)
        return F.linear(patches.to(self.weight.dtype).sub_(128), self.weight)


def split_heads(qkv: Tensor, heads: int) -> Tensor:
    """Fused queries, keys and values (B, T, 3·D) → (3, B, heads, T, d), without a copy."""
    b, t, width = qkv.shape
    return qkv.view(b, t, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)


def attend(qkv: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """Multi-head attention from fused queries, keys and values (B, T, 3·D) → (B, T, D)."""
    b, t, width = qkv.shape
    q, k, v = split_heads(qkv, heads)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return mixed.transpose(1, 2).reshape(b, t, width // 3)


class Block(nn.Module):
    """Pre-norm transformer block: `x + attention(norm(x))`, then `x + mlp(norm(x))`; LayerScale is in the weights."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.heads = a.heads
        self.swiglu = a.swiglu
        self.activation_name = a.activation
        self.activation = ACTIVATIONS[a.activation]
        self.norm1 = nn.LayerNorm(a.width, a.epsilon)
        self.qkv = nn.Linear(a.width, 3 * a.width, bias=a.qkv_bias != "none")
        self.out = nn.Linear(a.width, a.width)
        self.norm2 = nn.LayerNorm(a.width, a.epsilon)
        self.fc1 = nn.Linear(a.width, (1 + a.swiglu) * a.mlp_width)
        self.fc2 = nn.Linear(a.mlp_width, a.width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`bias` (1, heads, T, T) is added to the scaled attention scores."""
        x = x + self.out(attend(self.qkv(self.norm1(x)), self.heads, bias))
        return x + self.mlp(self.norm2(x))

    def mlp(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if self.swiglu:
            gate, value = hidden.chunk(2, dim=-1)
            return self.fc2(self.activation(gate) * value)  # type: ignore[no-any-return]
        return self.fc2(self.activation(hidden))  # type: ignore[no-any-return]


def blocks_for(blocks: nn.ModuleList, prefix_block: nn.Module | None, whole: bool) -> list[nn.Module]:
    """The blocks to run: all, or with `prefix_block` instead of the last one where not the `whole` is read."""
    return list(blocks) if whole or prefix_block is None else [*blocks[:-1], prefix_block]
