"""Blocks for x86 CPUs: weights laid out once for oneDNN, activation and residual added inside the matrix products.

torch lays a bfloat16 weight out anew at each call, and runs GELU and the additions as passes of their own over
memory. Both cost more the faster the matrix unit is.
"""

import platform

import torch
from torch import Tensor, nn

from pipeline.models.layers import Block, attend

# oneDNN's names for activations that it applies while it writes the product: (name, variant).
FUSED_ACTIVATIONS = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
ROWS_HINT = 32 * 197


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN runs these blocks here."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


class PackedLinear(nn.Module):
    """A linear layer whose weight is in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_HINT)
        self.bias = linear.bias

    def forward(self, x: Tensor, activation: tuple[str, str] = ("none", "")) -> Tensor:
        name, variant = activation
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], variant)
        return product

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The layer's output plus `residual`."""
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return total


class PackedBlock(nn.Module):
    """The same computation as `Block`."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.heads = block.heads
        self.swiglu = block.swiglu
        self.activation = block.activation
        self.fused_activation = None if block.swiglu else FUSED_ACTIVATIONS.get(block.activation_name)
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.qkv, self.out, self.fc1, self.fc2 = map(PackedLinear, (block.qkv, block.out, block.fc1, block.fc2))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self.out.plus(attend(self.qkv(self.norm1(x)), self.heads, bias), x)
        return self.fc2.plus(self.hidden(self.norm2(x)), x)

    def hidden(self, x: Tensor) -> Tensor:
        if self.fused_activation is not None:
            return self.fc1(x, self.fused_activation)  # type: ignore[no-any-return]
        hidden = self.fc1(x)
        if self.swiglu:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate) * value
        else:
            hidden = self.activation(hidden)
        return hidden  # type: ignore[no-any-return]


def pack(blocks: nn.ModuleList) -> None:
    """Replace each `Block` by its packed form, in place; the plain weights are let go. A Mixer's blocks stay."""
    for i, block in enumerate(blocks):
        if isinstance(block, Block):
            blocks[i] = PackedBlock(block)
