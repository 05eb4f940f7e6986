"""Which precision to compute in. The choice is a pure function of described hardware; reading it is apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from schemas.errors import SpecError
from schemas.machines import cpuinfo

if TYPE_CHECKING:
    import torch

    from schemas.spec import DTypeName

BFLOAT16_CPU_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
BFLOAT16_SINCE_SM = (8, 0)
INT8_CPU_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
FLOAT8_SINCE_SM = (8, 9)
# Precisions whose distance from float32 is measured on the user's own images before a run.
MEASURED = frozenset({"int8", "float8"})
# Below this median cosine, neighbours and labels change: a search would give other pictures.
LEAST_MEDIAN = 0.99


@dataclass(frozen=True)
class Hardware:
    """What decides about precision and kernels: flags and vendor of the CPU as Linux names them, the GPU's compute
    capability, and the number of cuDNN's version (91501 for 9.15.1; 0 without it)."""

    cpu_flags: frozenset[str] = frozenset()
    compute_capability: tuple[int, int] | None = None
    cpu_vendor: str = ""
    cudnn: int = 0


def choose_dtype(requested: DTypeName, *, cuda: bool, hardware: Hardware | None = None) -> DTypeName:
    """The precision for `requested` on a GPU (`cuda`) or CPU.

    `auto` is bfloat16 where the hardware computes in it (GPU sm80 and later, CPU with AMX or AVX512-BF16), float16 on
    older GPUs, and float32 elsewhere. Raises SpecError for a precision that the hardware has no units for, or none
    that pay (float16 on a CPU is slower than float32 and loses range), and for a GPU that is not there.
    """
    if hardware is None:
        hardware = describe_hardware(cuda=cuda)
    if cuda and hardware.compute_capability is None:
        raise SpecError("a GPU was asked for, but torch sees none on this machine; drop --gpus-per-actor or use one")
    if requested == "float16" and not cuda:
        raise SpecError(
            "--dtype float16 runs on GPUs only: --gpus-per-actor 1; on a CPU use auto, float32 or bfloat16, but a run "
            "keeps the precision that it began with"
        )
    if requested == "int8" and (cuda or not hardware.cpu_flags & INT8_CPU_FLAGS):
        where = (
            "on a GPU; use float8 or bfloat16 there" if cuda else "on this CPU, which has no VNNI or AMX units for it"
        )
        raise SpecError(
            f"--dtype int8 does not pay {where}; auto is the fastest precision that loses nothing to speak of"
        )
    if requested == "float8" and not cuda:
        raise SpecError("--dtype float8 runs on GPUs only (sm89 and later); on a CPU use auto or int8")
    if requested == "float8" and (hardware.compute_capability or (0, 0)) < FLOAT8_SINCE_SM:
        raise SpecError("--dtype float8 needs a GPU of compute capability 8.9 or later (L4, L40S, H100); use auto")
    if requested == "auto":
        return _automatic(cuda, hardware)
    return requested


def misfit(requested: str, dtype: str, nodes: Sequence[frozenset[str]]) -> str:
    """What to tell somebody whose CPU job in `dtype` runs on `nodes` with these CPU flags; empty where nothing.

    `auto` is settled before there is a cluster, by the machine that starts the job.
    """
    units = {"int8": INT8_CPU_FLAGS}.get(dtype, BFLOAT16_CPU_FLAGS)
    having = sum(bool(flags & units) for flags in nodes)
    if dtype in ("bfloat16", "int8") and having < len(nodes):
        return (
            f"{len(nodes) - having} of {len(nodes)} nodes have CPUs without units for {dtype}, which they compute "
            "several times slower than float32. A run keeps its precision: leave these nodes out, or begin another run "
            "with --dtype float32 and another --out"
        )
    if requested == "auto" and dtype == "float32" and having:
        return (
            f"{having} of {len(nodes)} nodes have CPUs that compute in bfloat16, several times faster than in float32, "
            "which --dtype auto took because this machine's CPU does not. A run keeps its precision: begin another "
            "with --dtype bfloat16 and another --out"
        )
    return ""


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that stands for a precision: that of the trunk, or for `int8` and `float8` that of its products."""
    import torch

    found: torch.dtype = getattr(torch, {"float8": "float8_e4m3fn"}.get(name, name))
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The other way round: `float32`, `bfloat16`, `float16`, `int8` or `float8`."""
    name = str(dtype).removeprefix("torch.")
    return "float8" if name == "float8_e4m3fn" else name


def _automatic(cuda: bool, hardware: Hardware) -> DTypeName:
    if cuda:
        capability = hardware.compute_capability
        return "bfloat16" if capability is not None and capability >= BFLOAT16_SINCE_SM else "float16"
    return "bfloat16" if hardware.cpu_flags & BFLOAT16_CPU_FLAGS else "float32"


def describe_hardware(*, cuda: bool) -> Hardware:
    """This machine's CPU flags and, if `cuda`, the compute capability of the current GPU and cuDNN's version."""
    capability, cudnn = None, 0
    if cuda:
        import torch

        if torch.cuda.is_available():
            capability = torch.cuda.get_device_capability()
            cudnn = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    return Hardware(frozenset(cpuinfo("flags", "Features").split()), capability, cpuinfo("vendor_id"), cudnn)
