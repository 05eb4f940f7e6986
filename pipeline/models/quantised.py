"""Linear layers that multiply in 8 bits: int8 on CPUs with VNNI or AMX, float8 on GPUs from sm89 on.

Weights have a scale for each output channel, taken once; activations one for each row (token), taken at each call.
One scale for a whole batch would let a single large activation coarsen all others. Nothing is calibrated.
"""

import torch
from torch import Tensor, nn

from pipeline.models.layers import ACTIVATIONS, IN_PLACE

INT8_MAX = 127.0
# The largest number of float8_e4m3fn (Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433).
FLOAT8_MAX = 448.0
# The largest magnitude of an activation below zero: GELU's least value is -0.16997, that of its tanh form -0.17004.
_LARGEST_BELOW_ZERO = {"gelu": 0.1701, "gelu_tanh": 0.1701, "relu": 0.0}
# Keeps an all-zero row from dividing by zero.
_LEAST_SCALE = 1e-12
# Few enough for what lies between two passes to stay in the caches, enough for the product to run at full speed.
_ROWS_AT_ONCE = 400


def row_scales(rows: Tensor) -> Tensor:
    """float32 scales (M, 1) of float32 rows (M, K): the largest magnitude of a row becomes INT8_MAX."""
    # Two passes that only read are faster than one that writes magnitudes first.
    largest = torch.maximum(rows.amax(dim=1, keepdim=True), rows.amin(dim=1, keepdim=True).neg_())
    return largest.clamp_min_(_LEAST_SCALE).div_(INT8_MAX)


def quantise_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float32 rows (M, K) → int8 (M, K) and float32 scales (M, 1), such that `q · scale` is nearest to the rows."""
    quantised = torch.empty(rows.shape, dtype=torch.int8)
    return quantised, _quantise_into(quantised, rows, torch.empty_like(rows))


def _quantise_into(quantised: Tensor, rows: Tensor, scratch: Tensor) -> Tensor:
    """Fill `quantised` and give the scales; `scratch` (M, K) is written over."""
    scale = row_scales(rows)
    quantised.copy_(torch.div(rows, scale, out=scratch).round_())
    return scale


def quantise_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (M, K) → float8_e4m3fn (M, K) and float32 scales (M, 1), such that `q · scale` is nearest to the rows."""
    return _scaled_float8(rows.float(), rows.abs().amax(dim=1, keepdim=True).float())


def quantise_activated(rows: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """As `quantise_float8` of the `activation` of `rows`, which is computed once.

    Above zero it rises, so its largest magnitude follows from the largest of the row: a compiler that fuses all this
    would otherwise compute it twice, for the scale and for the numbers. A row of which nothing lies above 0.5 may get a
    scale that is larger than it need be.
    """
    activate = ACTIVATIONS[activation]  # type: ignore[index]
    largest = activate(rows.amax(dim=1, keepdim=True).float()).clamp_min(_LARGEST_BELOW_ZERO[activation])
    return _scaled_float8(activate(rows.float()), largest)


def _scaled_float8(rows: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """float32 rows and the largest magnitude of each. One division a row: a reciprocal serves its numbers."""
    largest = largest.clamp_min(_LEAST_SCALE)
    scaled = rows * (FLOAT8_MAX / largest)
    return scaled.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn), largest / FLOAT8_MAX


class Int8Linear(nn.Module):
    """A linear layer of int8 products summed in int32; float32 in and out."""

    def __init__(self, linear: nn.Linear, activation: str = "") -> None:
        super().__init__()
        weight, scale = quantise_int8(linear.weight.detach().float())
        self.weight = weight.t()  # (K, N)
        self.scale = scale.reshape(1, -1)  # (1, N)
        self.bias = linear.bias
        self.in_place = IN_PLACE.get(activation)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(len(rows), self.scale.shape[1])
        step = min(len(rows), _ROWS_AT_ONCE)
        shape_in, shape_out = (step, rows.shape[1]), (step, out.shape[1])
        scratch, small = rows.new_empty(shape_in), torch.empty(shape_in, dtype=torch.int8)
        product = torch.empty(shape_out, dtype=torch.int32)
        for some, result in zip(torch.split(rows, step), torch.split(out, step), strict=True):
            n = len(some)
            scale = _quantise_into(small[:n], some, scratch[:n])
            torch._int_mm(small[:n], self.weight, out=product[:n])
            result.copy_(product[:n]).mul_(scale)
            if self.bias is None:
                result.mul_(self.scale)
            else:
                torch.addcmul(self.bias, result, self.scale, out=result)
        if self.in_place is not None:
            self.in_place(out)
        return out.view(*x.shape[:-1], -1)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The layer's output plus `residual`."""
        return self.forward(x).add_(residual)


class Float8Linear(nn.Module):
    """A linear layer of float8 products with a scale for each row and each column; bfloat16 in and out.

    On a CPU the same numbers are multiplied in float32: slow, but the same quantisation, for tests.
    """

    def __init__(self, linear: nn.Linear, activation: str = "") -> None:
        super().__init__()
        weight, scale = quantise_float8(linear.weight.detach())
        self.weight = weight.t()  # (K, N), columns contiguous, as the kernel wants it
        self.scale = scale.reshape(1, -1)  # (1, N)
        self.bias = linear.bias
        self.in_place = IN_PLACE.get(activation)

    def forward(self, x: Tensor) -> Tensor:
        quantised, scale = self.quantise(x.reshape(-1, x.shape[-1]))
        out = scaled_product(quantised, scale, self.weight, self.scale, self.bias)
        if self.in_place is not None:
            self.in_place(out)
        return out.view(*x.shape[:-1], -1)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The layer's output plus `residual`."""
        return self.forward(x) + residual

    def quantise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return quantise_float8(rows)


class ActivatedFloat8Linear(Float8Linear):
    """A Float8Linear whose `activation` goes before it: it takes what is yet to be activated."""

    def __init__(self, linear: nn.Linear, activation: str = "") -> None:
        super().__init__(linear)
        self.activation = activation

    def quantise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return quantise_activated(rows, self.activation) if self.activation else quantise_float8(rows)


def scaled_product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, bias: Tensor | None) -> Tensor:
    """bfloat16 (M, N) from float8 `a` (M, K) and `b` (K, N) with scales (M, 1) and (1, N)."""
    if a.is_cuda:
        return torch._scaled_mm(
            a, b, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    product = (a.float() @ b.float()) * scale_a * scale_b
    return (product if bias is None else product + bias.float()).to(torch.bfloat16)
