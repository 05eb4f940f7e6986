"""How the matrix products of the blocks are computed: a pure function of precision, device and machine.

The code that runs them is elsewhere (`packed.py` and the files beside it), so that each choice can be tested where the
hardware is not.
"""

import platform
from typing import TYPE_CHECKING, Literal

from pipeline.models.precision import Hardware
from schemas.errors import SpecError

if TYPE_CHECKING:
    from pipeline.models.beit import Beit
    from pipeline.models.mixer import Mixer
    from pipeline.models.packed import FusedLinear
    from pipeline.models.vit import ViT

Linear = Literal["plain", "onednn", "mkl", "epilogue", "int8", "float8"]
# Where cuBLASLt writes GELU with the product faster than a pass of its own does. Measured by others: on H100 and H200
# it is (llm.c #653, sglang #34350, TensorRT-LLM #17693), on sm89 and sm120 it is the slower one.
_EPILOGUE_ON = (9, 0)
# It knows the tanh form alone. That is 2e-4 from the exact one, of the activations' rms, and rounding them to bfloat16
# is 1.7e-3; to float16 it is 2e-4 as well.
_EPILOGUES = {"bfloat16": ("gelu", "gelu_tanh"), "float16": ("gelu_tanh",)}


def choose_linear(
    dtype: str, device: str, hardware: Hardware, libraries: frozenset[str], activation: str = ""
) -> Linear:
    """The layers for `dtype` (`float32`, `bfloat16`, `float16`, `int8`, `float8`) on `device` (`cpu` or `cuda`), for a
    network with `activation`.

    `libraries`: what `cpu_libraries` gives. MKL only where its packed product was measured to be the faster one:
    float32 on Intel's processors. `epilogue` computes an exact GELU by its tanh form.
    """
    if dtype in ("int8", "float8"):
        return dtype  # type: ignore[return-value]
    if device == "cuda" and hardware.compute_capability == _EPILOGUE_ON and activation in _EPILOGUES.get(dtype, ()):
        return "epilogue"
    if device != "cpu" or dtype not in ("float32", "bfloat16"):
        return "plain"
    if dtype == "float32" and hardware.cpu_vendor == "GenuineIntel" and "mkl" in libraries:
        return "mkl"
    return "onednn" if ("onednn" if dtype == "float32" else "onednn-bfloat16") in libraries else "plain"


def cpu_libraries() -> frozenset[str]:
    """Which of `mkl`, `onednn` and `onednn-bfloat16` torch has on this machine, if it is an x86 one. The last is not
    there on CPUs without AVX-512, where oneDNN refuses bfloat16 and only torch's own product takes it."""
    import torch

    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    there = {
        "mkl": torch.backends.mkl.is_available(),  # type: ignore[no-untyped-call]
        "onednn": onednn,
        "onednn-bfloat16": onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }
    return frozenset(name for name, available in there.items() if available)


def linear_type(kind: Linear) -> "type[FusedLinear]":
    """The class for a kind that `choose_linear` gives, but for `plain`."""
    from pipeline.models.packed import EpilogueLinear, MklLinear, OneDnnLinear
    from pipeline.models.quantised import Float8Linear, Int8Linear

    kinds: dict[str, type[FusedLinear]] = {"onednn": OneDnnLinear, "mkl": MklLinear, "epilogue": EpilogueLinear}
    return {**kinds, "int8": Int8Linear, "float8": Float8Linear}[kind]


def replace_linears(trunk: "ViT | Beit | Mixer", kind: Linear) -> None:
    """Give the trunk's blocks layers of `kind`, in place; those bring their own weights, the plain ones are let go.

    A Mixer's blocks stay as they are. Raises SpecError where that leaves nothing of `int8` or `float8`.
    """
    if kind == "plain":
        return
    from pipeline.models.layers import Block
    from pipeline.models.mixer import Mixer
    from pipeline.models.packed import PackedBlock
    from pipeline.models.quantised import ActivatedFloat8Linear

    if isinstance(trunk, Mixer):
        if kind in ("int8", "float8"):
            raise SpecError(f"--dtype {kind}: an MLP-Mixer runs in float32, bfloat16 or float16")
        return
    linear = linear_type(kind)
    activated = ActivatedFloat8Linear if kind == "float8" else None
    last = trunk.prefix_block
    if last is not None:
        for name in ("q", "kv", "out", "fc1", "fc2"):
            setattr(last, name, linear(getattr(last, name)))
    # Whoever reads the prefix alone never runs the whole last block.
    for i in range(len(trunk.blocks) - (last is not None)):
        block = trunk.blocks[i]
        assert isinstance(block, Block)
        trunk.blocks[i] = PackedBlock(block, linear, activated)
