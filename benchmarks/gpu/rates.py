"""Images/s of one network in one precision, from the code that an actor runs, and whether its results are right."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from device import Bench, attention_inputs
from networks import CALL_ROWS, Features, Weights, direct, network, pictures
from torch.nn.attention import SDPBackend

from pipeline.models.architecture import Architecture
from pipeline.models.gpu import Compiled, plan_gpu
from pipeline.models.layers import split_heads
from pipeline.predictors.torch_runner import Runner, compile_trunk

CALLS = 8
# Least cosine of the code that is timed to the same network called directly in the same precision. In float8 a last bit
# of bfloat16 can move a number by a sixteenth: a compiled network was 0.998 from itself, another picture 0.98.
LEAST = {"bfloat16": 0.999, "float8": 0.99}
# What a product with wrong scales, or a wrong layout, does not reach. Emulated, float8 was 0.9955 and above.
LEAST_TO_FLOAT32 = {"bfloat16": 0.99, "float8": 0.97}


def least_cosines(ours: Any, theirs: Any) -> list[float]:
    """Of CLS and pooled, over the rows that both have."""
    count = min(len(ours[0]), len(theirs[0]))
    return [
        float(torch.cosine_similarity(a[:count].float(), b[:count].float(), dim=1).min())
        for a, b in zip(ours, theirs, strict=True)
    ]


def least_cosine(ours: Any, theirs: Any) -> float:
    """Of both; not a number where one of them is not."""
    return float(torch.tensor(least_cosines(ours, theirs)).min())


def in_turn(runner: Runner, call: npt.NDArray[np.uint8], calls: int) -> None:
    """So many calls as an actor makes them: the next is handed over while one computes."""
    underway = runner.start(call)
    for _ in range(calls - 1):
        following = runner.start(call)
        underway.results()
        underway = following
    underway.results()


def attention_taken(runner: Runner, a: Architecture, bench: Bench) -> str:
    """The kernel that torch takes for a block's shapes, of those it may: it passes over one that does not fit them."""
    rows, columns = a.grid(a.trained_size)
    tokens = a.prefix_tokens + rows * columns
    qkv, bias = attention_inputs(bench, runner.batch, tokens, a.width, a.heads)
    q, k, v = split_heads(qkv, a.heads)
    mask = None if a.relative_positions == "none" else bias
    with runner._kernels():
        return str(SDPBackend(torch._fused_sdp_choice(q, k, v, mask, 0.0, False)).name)


class Subject:
    """A network in one precision, in our layers or, if not `packed`, in plain ones, `compiled` on a GPU; with what it
    should give, taken before that."""

    def __init__(
        self, a: Architecture, weights: Weights, dtype: str, compiled: Compiled, packed: bool, most: int, bench: Bench
    ) -> None:
        self.a, self.dtype, self.bench, self.compiled = a, dtype, bench, compiled
        self.model = network(a, weights.tensors, dtype, bench.device, packed=packed)
        self.pixels = pictures(max(2 * most + 3, CALL_ROWS.get(a.trained_size[0], 0)), a.trained_size)
        self.expected = direct(self.model, self.pixels[: 2 * most + 3], bench.device)
        self.exact = weights.exact
        if bench.cuda:
            torch.compiler.reset()  # dynamo gives up on a function that it has compiled eight times
            compile_trunk(self.model.trunk, compiled)

    @property
    def correctness(self) -> dict[str, float]:
        """Least cosine to float32."""
        return dict(zip(("cls", "pooled"), least_cosines(self.expected, self.exact), strict=True))

    def runner(self, batch: int) -> Runner:
        bias = self.a.relative_positions != "none"
        plan = plan_gpu(self.bench.hardware, self.dtype, attention_bias=bias, work_gflop=0)

        def forward(pixels: torch.Tensor) -> Features:
            outputs = self.model(pixels)
            return outputs.cls, outputs.pooled

        started = time.monotonic()
        runner = Runner(
            forward,
            batch=batch,
            shape=(*self.a.trained_size, 3),
            device=self.bench.device,
            graphs=plan.graphs,
            attention=plan.attention if self.bench.cuda else ("FLASH_ATTENTION", "MATH"),
        )
        if self.compiled != "nothing":
            self.bench.longest_compile_s = max(self.bench.longest_compile_s, time.monotonic() - started)
        return runner

    @torch.inference_mode()
    def rates(self, batch: int) -> dict[str, Any]:
        """Images/s model-only and end to end, and how near the results are to what they should be."""
        runner = self.runner(batch)
        # An odd number, so that a padded batch comes after both buffers have been used.
        got = runner.run(self.pixels[: 2 * batch + 3])
        row = {
            "attention": attention_taken(runner, self.a, self.bench),
            "graphs": bool(runner._graphs),
            "least_cosine": least_cosine(got, self.expected),
            "least_cosine_to_float32": least_cosine(got, self.exact),
        }
        runner.run(self.pixels[: 2 * batch])  # both buffers full of pictures again
        alone = self.bench.seconds(lambda: runner._compute(0)) / batch
        row["model_only"] = 1 / alone
        call = self.pixels[: CALL_ROWS.get(self.a.trained_size[0], 2 * batch)]
        for name, calls in (("one_call", 1), ("end_to_end", CALLS)):
            each = self.bench.seconds(lambda calls=calls: in_turn(runner, call, calls)) / (calls * len(call))
            row |= {name: 1 / each, f"{name}_share": alone / each}
        row["call_batches"] = len(call) / batch
        return row
