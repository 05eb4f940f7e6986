"""Which precision to compute in. The choice is a pure function of described hardware; reading it is apart."""

import platform
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import SpecError
from schemas.spec import DTypeName

BFLOAT16_CPU_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
BFLOAT16_SINCE_SM = (8, 0)


@dataclass(frozen=True)
class Hardware:
    """What decides about precision: flags of the CPU as Linux names them, and the GPU's compute capability."""

    cpu_flags: frozenset[str] = frozenset()
    compute_capability: tuple[int, int] | None = None


def choose_dtype(requested: DTypeName, *, cuda: bool, hardware: Hardware | None = None) -> DTypeName:
    """The precision for `requested` on a GPU (`cuda`) or CPU.

    `auto` is bfloat16 where the hardware computes in it (GPU sm80 and later, CPU with AMX or AVX512-BF16), float16 on
    older GPUs, and float32 elsewhere. Raises SpecError for float16 on a CPU, where it is slower than float32 and
    loses range, and for a GPU that is not there.
    """
    if hardware is None:
        hardware = describe_hardware(cuda=cuda)
    if cuda and hardware.compute_capability is None:
        raise SpecError("a GPU was asked for, but torch sees none on this machine; drop --gpus-per-actor or use one")
    if requested == "float16" and not cuda:
        raise SpecError("--dtype float16 runs on GPUs only; on a CPU use auto, float32 or bfloat16")
    if requested == "auto":
        return _automatic(cuda, hardware)
    return requested


def _automatic(cuda: bool, hardware: Hardware) -> DTypeName:
    if cuda:
        capability = hardware.compute_capability
        return "bfloat16" if capability is not None and capability >= BFLOAT16_SINCE_SM else "float16"
    return "bfloat16" if hardware.cpu_flags & BFLOAT16_CPU_FLAGS else "float32"


def describe_hardware(*, cuda: bool) -> Hardware:
    """This machine's CPU flags and, if `cuda`, the compute capability of the current GPU."""
    capability = None
    if cuda:
        import torch

        if torch.cuda.is_available():
            capability = torch.cuda.get_device_capability()
    return Hardware(_cpu_flags(), capability)


def _cpu_flags() -> frozenset[str]:
    """Linux: from /proc/cpuinfo. macOS on ARM computes bfloat16 in software, so it has none that count."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
