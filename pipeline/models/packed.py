"""Blocks in layers of another kind: weights laid out once for what multiplies, little else that passes over memory.

On x86 CPUs two libraries, because neither is the faster one everywhere. In bfloat16 oneDNN: torch would lay a weight
out anew at each call, and runs GELU and the additions as passes of their own, which cost more the faster the matrix
unit is. In float32 on Intel's processors MKL: its packed product was measured 5 to 28% faster than torch's own and than
oneDNN's. On GPUs cuBLASLt, which can write GELU with the product. `kernels.py` chooses.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.models.layers import IN_PLACE, Block, attend

# oneDNN's names for activations that it applies while it writes the product: (name, variant).
FUSED_ACTIVATIONS = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
ROWS_HINT = 32 * 197


class OneDnnLinear(nn.Module):
    """A linear layer whose weight is in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear, activation: str = "") -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_HINT)
        self.bias = linear.bias
        self.name, self.variant = FUSED_ACTIVATIONS.get(activation, ("none", ""))

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.name, [], self.variant)
        return product

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The layer's output plus `residual`."""
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return total


class MklLinear(nn.Module):
    """A linear layer whose weight is in MKL's own layout, which holds for one number of rows: the largest yet seen.

    A smaller batch, such as the last one of a block, is multiplied as torch does it.
    """

    def __init__(self, linear: nn.Linear, activation: str = "") -> None:
        super().__init__()
        self.weight = linear.weight.detach()
        self.bias = linear.bias
        self.in_place = IN_PLACE.get(activation)
        # Together, for several threads may be here at once.
        self.packed = (self.weight, 0)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        packed, packed_rows = self.packed
        if rows > packed_rows:
            packed, packed_rows = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows), rows
            self.packed = packed, rows
        # Gives torch's own product where the rows are not those of the packed weight.
        product: Tensor = torch.ops.mkl._mkl_linear(x, packed, self.weight, self.bias, packed_rows)
        if self.in_place is not None:
            self.in_place(product)
        return product

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The layer's output plus `residual`."""
        return self.forward(x).add_(residual)


class EpilogueLinear(nn.Module):
    """A linear layer in whose product a GPU writes GELU by its tanh form, the only one that cuBLASLt knows."""

    def __init__(self, linear: nn.Linear, activation: str = "") -> None:
        super().__init__()
        assert activation in ("", "gelu", "gelu_tanh")
        self.weight, self.bias = linear.weight.detach(), linear.bias
        self.activated = bool(activation)

    def forward(self, x: Tensor) -> Tensor:
        if not self.activated:
            return nn.functional.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        # On a CPU torch takes the exact form here: near enough to test what surrounds it.
        out = torch._addmm_activation(self.bias, rows, self.weight.t(), use_gelu=True)
        return out.view(*x.shape[:-1], -1)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The layer's output plus `residual`."""
        return self.forward(x) + residual


class FusedLinear(Protocol):
    """What stands in for a linear layer in a `PackedBlock`; made from it, with the activation behind it or none."""

    def __init__(self, linear: nn.Linear, activation: str = "") -> None: ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def plus(self, x: Tensor, residual: Tensor) -> Tensor: ...


class PackedBlock(nn.Module):
    """The same computation as `Block`, in layers of another kind.

    `activated`: the kind of the MLP's second layer, where that and not the first one computes the activation.
    """

    def __init__(self, block: Block, linear: type[FusedLinear], activated: type[FusedLinear] | None = None) -> None:
        super().__init__()
        self.heads = block.heads
        self.swiglu = block.swiglu
        self.fused = not block.swiglu and block.activation_name in FUSED_ACTIVATIONS
        self.activation = block.activation
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.qkv, self.out = linear(block.qkv), linear(block.out)
        name = block.activation_name if self.fused else ""
        if activated is None:
            self.fc1, self.fc2 = linear(block.fc1, name), linear(block.fc2)
        else:
            self.fc1, self.fc2 = linear(block.fc1), activated(block.fc2, name)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self.out.plus(attend(self.qkv(self.norm1(x)), self.heads, bias), x)
        return self.fc2.plus(self.hidden(self.norm2(x)), x)

    def hidden(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.fc1(x)
        if self.swiglu:
            gate, value = hidden.chunk(2, dim=-1)
            return self.activation(gate) * value
        return hidden if self.fused else self.activation(hidden)
