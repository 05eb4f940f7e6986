"""The precision that `auto` and the rest choose, on hardware that need not be here."""

import pytest
import torch

from pipeline.models.precision import Hardware, choose_dtype, describe_hardware
from schemas.errors import SpecError
from schemas.spec import DTypeName

PLAIN = Hardware(frozenset({"avx2", "avx512f"}))


@pytest.mark.parametrize(
    ("hardware", "cuda", "expected"),
    [
        (Hardware(compute_capability=(9, 0)), True, torch.bfloat16),
        (Hardware(compute_capability=(8, 0)), True, torch.bfloat16),
        (Hardware(compute_capability=(7, 5)), True, torch.float16),
        (Hardware(frozenset({"amx_bf16"}), (7, 0)), True, torch.float16),
        (Hardware(frozenset({"avx512f", "amx_bf16"})), False, torch.bfloat16),
        (Hardware(frozenset({"avx512f", "avx512_bf16"})), False, torch.bfloat16),
        (Hardware(frozenset({"avx512f"}), (9, 0)), False, torch.float32),
        (Hardware(), False, torch.float32),
    ],
)
def test_auto(hardware: Hardware, cuda: bool, expected: torch.dtype) -> None:
    assert choose_dtype("auto", cuda=cuda, hardware=hardware) == expected


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_what_is_asked_for_is_given(name: DTypeName) -> None:
    assert choose_dtype(name, cuda=False, hardware=PLAIN) == getattr(torch, name)


def test_refusals() -> None:
    with pytest.raises(SpecError, match="float16 runs on GPUs only"):
        choose_dtype("float16", cuda=False, hardware=PLAIN)
    with pytest.raises(SpecError, match="torch sees none"):
        choose_dtype("auto", cuda=True, hardware=PLAIN)


def test_this_machine_is_described() -> None:
    hardware = describe_hardware(cuda=False)
    assert hardware.compute_capability is None
    assert choose_dtype("auto", cuda=False) in {torch.bfloat16, torch.float32}
