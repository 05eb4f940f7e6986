"""The device: its clock, the deadline, and what it can do at best."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from common import current_commit
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.models.beit import BIAS_ALIGNMENT
from pipeline.models.gpu import has_compiler
from pipeline.models.layers import attend
from pipeline.models.precision import FLOAT8_SINCE_SM, describe_hardware, torch_dtype
from pipeline.models.quantised import quantise_float8, scaled_product
from schemas.machines import cpuinfo

# Kernels are timed this many at a time, or the launch and the wait for each would be in the figure.
_AT_ONCE = 8
_BRIEFLY_S = 0.2
_WARM_S = 0.5


class Sizes(NamedTuple):
    """Of what the ceilings are taken with; products and attention are those of a network at one batch size."""

    side: int
    copy_bytes: int
    batch: int
    tokens: int
    width: int
    heads: int


SIZES = Sizes(side=8192, copy_bytes=1 << 30, batch=256, tokens=197, width=1024, heads=16)
TINY_SIZES = Sizes(side=64, copy_bytes=1 << 20, batch=2, tokens=5, width=64, heads=2)


class Bench:
    """The device, its clock and the deadline."""

    def __init__(self, device: str, minutes: float, measure_s: float) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            # Streams, graphs and waits are the current device's. A bare "cuda" has no index, which torch refuses here.
            torch.cuda.set_device(self.device.index or 0)
        self.until = time.monotonic() + 60 * minutes
        self.measure_s = measure_s
        self.hardware = describe_hardware(cuda=self.cuda)
        self.longest_compile_s = 0.0

    @property
    def float8(self) -> bool:
        return not self.cuda or (self.hardware.compute_capability or (0, 0)) >= FLOAT8_SINCE_SM

    def late(self, *, compiled: bool = False) -> bool:
        """Whether time is up, or would be while something is `compiled` that takes as long as the longest yet did."""
        return time.monotonic() + compiled * self.longest_compile_s > self.until

    def seconds(self, work: Callable[[], Any], measure_s: float | None = None) -> float:
        """Median seconds of one call, each with the device idle before and after."""
        started = time.perf_counter()
        for number in range(3):
            if number == 0 or time.perf_counter() - started < _WARM_S:
                work()
                self.wait()
        taken: list[float] = []
        while len(taken) < 3 or (sum(taken) < (measure_s or self.measure_s) and len(taken) < 200):
            started = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - started)
        return float(np.median(taken))

    def seconds_among(self, work: Callable[[], Any], measure_s: float) -> float:
        """Of one call among several that follow each other."""
        several = lambda: [work() for _ in range(_AT_ONCE)]  # noqa: E731
        return self.seconds(several, measure_s) / _AT_ONCE

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def environment(bench: Bench, commit: str | None) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if bench.cuda else "cpu",
        # What goes from and to the host's memory depends on it.
        "cpu": cpuinfo("model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "capability": list(bench.hardware.compute_capability or ()) or None,
        "cuda": torch.version.cuda,
        "cudnn": bench.hardware.cudnn,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": has_compiler(),
        "commit": commit or current_commit(),
    }


def rate(work: float, bench: Bench, call: Callable[[], Any], *, briefly: bool = True) -> float | str:
    """`work` over the seconds of a call, or what it raises: one kernel that fails must not cost the other figures."""
    try:
        return work / bench.seconds_among(call, min(_BRIEFLY_S, bench.measure_s) if briefly else bench.measure_s)
    except Exception as error:  # noqa: BLE001  an older torch lacks a name, a check of shapes is a ValueError
        return f"{type(error).__name__}: {error}"[:200]


def product(bench: Bench, side: int, dtype: str) -> float | str:
    """TFLOP/s of a product of `side`³."""
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch_dtype(dtype)) for _ in range(2))
    return rate(2e-12 * side**3, bench, lambda: a @ b.t(), briefly=False)


def ceilings(bench: Bench, sizes: Sizes) -> dict[str, float | str]:
    """TFLOP/s of products of `side`³ and GB/s of copies."""
    found: dict[str, float | str] = {}
    side, copy_bytes = sizes.side, sizes.copy_bytes
    for name in ("bfloat16", "float32"):
        found[f"product_{name}_tflops"] = product(bench, side, name)
    if bench.float8:
        (a, sa), (b, sb) = (quantise_float8(torch.randn(side, side, device=bench.device)) for _ in range(2))
        scaled = lambda: scaled_product(a, sa, b.t(), sb.reshape(1, -1), None)  # noqa: E731
        found["product_float8_tflops"] = rate(2e-12 * side**3, bench, scaled, briefly=False)
    host = torch.zeros(copy_bytes, dtype=torch.uint8, pin_memory=bench.cuda)
    there, other = (torch.zeros(copy_bytes, dtype=torch.uint8, device=bench.device) for _ in range(2))
    for name, target, source in (("to_device", there, host), ("from_device", host, there), ("on_device", other, there)):
        work = lambda target=target, source=source: target.copy_(source, non_blocking=True)  # noqa: E731
        found[f"copy_{name}_gb_per_s"] = rate(1e-9 * copy_bytes, bench, work, briefly=False)
    return found


def ceiling_again(bench: Bench, sizes: Sizes) -> dict[str, float | str]:
    """The product that shares are taken of, once more: how far the device's clock has moved meanwhile."""
    return {"product_bfloat16_tflops": product(bench, sizes.side, "bfloat16")}


def block_products(bench: Bench, sizes: Sizes) -> dict[str, dict[str, float | str]]:
    """TFLOP/s of the four products of a block by kind: float8 with a scale for each row, as ours have it, and with one
    for each matrix, which is what a large product could gain by coarser scales."""
    found: dict[str, dict[str, float | str]] = {}
    m, d = sizes.batch * sizes.tokens, sizes.width
    for name, k, n in (("qkv", d, 3 * d), ("out", d, d), ("fc1", d, 4 * d), ("fc2", 4 * d, d)):
        x, w = (torch.randn(rows, k, device=bench.device, dtype=torch.bfloat16) for rows in (m, n))
        bias = torch.zeros(n, device=bench.device, dtype=torch.bfloat16)
        kinds: dict[str, Callable[[], Any]] = {"bfloat16": lambda x=x, w=w, bias=bias: F.linear(x, w, bias)}
        if bench.float8:
            (a, sa), (b, sb) = quantise_float8(x), quantise_float8(w)
            scales = (sa, sb.reshape(1, -1))
            kinds["float8_rows"] = lambda a=a, b=b, s=scales, bias=bias: scaled_product(a, s[0], b.t(), s[1], bias)
            # On a CPU one scale is the same work: it is there to be run.
            one = tuple(torch.ones((), device=bench.device) for _ in range(2))
            kinds["float8_tensor"] = lambda a=a, b=b, s=one, bias=bias: scaled_product(a, s[0], b.t(), s[1], bias)
        found[name] = {kind: rate(2e-12 * m * k * n, bench, call) for kind, call in kinds.items()}
    found["fc1_gelu"] = activated_product(bench, sizes)
    return found


def activated_product(bench: Bench, sizes: Sizes) -> dict[str, float | str]:
    """TFLOP/s of fc1 with GELU: a pass of its own in the exact form, and the tanh form written with the product. What
    lies between is what a network with the exact form would gain by the other."""
    m, d = sizes.batch * sizes.tokens, sizes.width
    x, w = (torch.randn(rows, d, device=bench.device, dtype=torch.bfloat16) for rows in (m, 4 * d))
    bias = torch.zeros(4 * d, device=bench.device, dtype=torch.bfloat16)
    kinds: dict[str, Callable[[], Any]] = {
        "bfloat16": lambda: F.gelu(F.linear(x, w, bias)),
        "epilogue": lambda: torch._addmm_activation(bias, x, w.t(), use_gelu=True),
    }
    return {kind: rate(8e-12 * m * d * d, bench, call) for kind, call in kinds.items()}


def attention_inputs(
    bench: Bench, batch: int, tokens: int, width: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused queries, keys and values (B, T, 3·D), and a bias (1, heads, T, T) stored as BEiT's is."""
    stride = -(-tokens // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
    qkv = torch.randn(batch, tokens, 3 * width, device=bench.device, dtype=torch.bfloat16)
    bias = torch.randn(1, heads, tokens, stride, device=bench.device, dtype=torch.bfloat16)
    return qkv, bias[..., :tokens]


def attention_kernels(bench: Bench, sizes: Sizes) -> dict[str, float | str]:
    """TFLOP/s of the attention of a block by kernel, or what it raises; from fused queries, keys and values. `_BIAS`:
    with one bias for all images, as BEiT has it."""
    qkv, bias = attention_inputs(bench, sizes.batch, sizes.tokens, sizes.width, sizes.heads)
    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION") if bench.cuda else ("FLASH_ATTENTION",)
    work = 4e-12 * sizes.batch * sizes.tokens**2 * sizes.width
    found: dict[str, float | str] = {}
    for name in names:
        with sdpa_kernel(getattr(SDPBackend, name)):
            found[name] = rate(work, bench, lambda: attend(qkv, sizes.heads, None))
            if name != "FLASH_ATTENTION" or not bench.cuda:  # on GPUs it takes none
                found[f"{name}_BIAS"] = rate(work, bench, lambda: attend(qkv, sizes.heads, bias))
    return found
