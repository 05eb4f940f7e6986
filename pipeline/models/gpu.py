"""How a network runs on a GPU: a pure function of the GPU, the precision, the network and the length of the job.

What runs it is in `predictors/torch_runner.py`; here is only what is chosen, so that it can be tested without a GPU.
"""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Literal, NamedTuple

from pipeline.models.precision import Hardware

# Names of torch.nn.attention.SDPBackend, best first.
_FLASH = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
_HOPPER = ("CUDNN_ATTENTION", *_FLASH)
_WITH_BIAS = ("EFFICIENT_ATTENTION", "MATH")
_SM80 = (8, 0)
# As torch itself has it: older ones are wrong where the tokens are no multiple of 128 (pytorch #169849). Blackwell is
# left out although torch takes cuDNN there: a single query, as the last block has it, came out wrong (#193893).
_CUDNN_SINCE, _CUDNN_MAJOR = 91501, 9
# Compiling takes about a minute. timm's tables give 9 to 21% for it; where GELU goes with its product, additions and
# norms are all that is left to join. It surely pays from here on.
COMPILE_FROM_S = 900.0
# What a GPU surely sustains; only to tell a short job from a long one.
_GFLOP_PER_S = 200_000.0
# Of a larger batch: what a smaller one may lose and still be taken, as it leaves more memory and shorter blocks.
BATCH_TOLERANCE = 0.97


Compiled = Literal["nothing", "blocks", "trunk"]


class GpuPlan(NamedTuple):
    """`attention`: kernels to try, best first. `compiled`: what torch.compile gets. `graphs`: CUDA graphs."""

    attention: tuple[str, ...]
    compiled: Compiled
    graphs: bool


def plan_gpu(
    hardware: Hardware, dtype: str, *, attention_bias: bool, work_gflop: float, compiler: bool = True
) -> GpuPlan:
    """The plan for one actor that has `work_gflop` before it, on a GPU of `hardware`.

    The flash kernels take no bias, so BEiT's relative positions leave the memory-efficient one, for which the bias is
    stored with an aligned stride. A long job compiles the trunk as a whole. float8 is always compiled: scaling the
    activations is a dozen passes over memory otherwise, which cost more than the products gain. Where the job is short
    that is one block for all, which takes half the time or less and leaves a pass over memory between two blocks. CUDA
    graphs cost a few seconds and save each launch. Without a C `compiler` on the machine nothing can be compiled;
    float8 is then right, and slower than bfloat16.
    """
    attention: tuple[str, ...]
    capability = hardware.compute_capability or (0, 0)
    if attention_bias or dtype == "float32" or capability < _SM80:
        attention = _WITH_BIAS
    else:
        cudnn = capability[0] == _CUDNN_MAJOR and hardware.cudnn >= _CUDNN_SINCE
        attention = _HOPPER if cudnn else _FLASH
    compiled: Compiled = "nothing"
    if compiler and work_gflop / _GFLOP_PER_S >= COMPILE_FROM_S:
        compiled = "trunk"
    elif compiler and dtype == "float8":
        compiled = "blocks"
    return GpuPlan(attention, compiled, graphs=True)


def has_compiler() -> bool:
    """Whether this machine has what torch.compile builds the callers of its kernels with: CC, gcc or clang, and
    Python's headers."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    return headers and any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang") if name)


def choose_batch(images_per_s: dict[int, float]) -> int:
    """The smallest batch size whose measured rate is within BATCH_TOLERANCE of the best."""
    best = max(images_per_s.values())
    return min(size for size, rate in images_per_s.items() if rate >= BATCH_TOLERANCE * best)
