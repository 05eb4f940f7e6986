"""The precision that `auto` and the rest choose, on hardware that need not be here."""

import pytest

from pipeline.models.precision import Hardware, choose_dtype, describe_hardware
from schemas.errors import SpecError
from schemas.spec import DTypeName

PLAIN = Hardware(frozenset({"avx2", "avx512f"}))


@pytest.mark.parametrize(
    ("hardware", "cuda", "expected"),
    [
        (Hardware(compute_capability=(9, 0)), True, "bfloat16"),
        (Hardware(compute_capability=(8, 0)), True, "bfloat16"),
        (Hardware(compute_capability=(7, 5)), True, "float16"),
        (Hardware(frozenset({"amx_bf16"}), (7, 0)), True, "float16"),
        (Hardware(frozenset({"avx512f", "amx_bf16"})), False, "bfloat16"),
        (Hardware(frozenset({"avx512f", "avx512_bf16"})), False, "bfloat16"),
        (Hardware(frozenset({"avx512f"}), (9, 0)), False, "float32"),
        (Hardware(), False, "float32"),
    ],
)
def test_auto(hardware: Hardware, cuda: bool, expected: DTypeName) -> None:
    assert choose_dtype("auto", cuda=cuda, hardware=hardware) == expected


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_what_is_asked_for_is_given(name: DTypeName) -> None:
    assert choose_dtype(name, cuda=False, hardware=PLAIN) == name


def test_refusals() -> None:
    with pytest.raises(SpecError, match="float16 runs on GPUs only"):
        choose_dtype("float16", cuda=False, hardware=PLAIN)
    with pytest.raises(SpecError, match="torch sees none"):
        choose_dtype("auto", cuda=True, hardware=PLAIN)


def test_this_machine_is_described() -> None:
    hardware = describe_hardware(cuda=False)
    assert hardware.compute_capability is None
    assert choose_dtype("auto", cuda=False) in {"bfloat16", "float32"}
