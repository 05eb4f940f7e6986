"""The precision that `auto` and the rest choose, on hardware that need not be here."""

import pytest

from pipeline.models.precision import Hardware, choose_dtype, describe_hardware, misfit
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


WITH, WITHOUT = frozenset({"avx512f", "amx_bf16", "amx_int8"}), frozenset({"avx2"})


@pytest.mark.parametrize(
    ("requested", "dtype", "nodes", "says"),
    [
        ("auto", "float32", (WITH, WITHOUT), "1 of 2 nodes have CPUs that compute in bfloat16"),
        ("auto", "bfloat16", (WITH, WITHOUT, WITHOUT), "2 of 3 nodes have CPUs without units for bfloat16"),
        ("int8", "int8", (WITHOUT,), "1 of 1 nodes have CPUs without units for int8"),
        ("auto", "float32", (WITHOUT, WITHOUT), ""),
        ("auto", "bfloat16", (WITH,), ""),
        ("float32", "float32", (WITH,), ""),
        ("auto", "bfloat16", (), ""),
    ],
)
def test_nodes_that_compute_in_another_precision(
    requested: str, dtype: str, nodes: tuple[frozenset[str], ...], says: str
) -> None:
    told = misfit(requested, dtype, nodes)
    assert told.startswith(says)
    assert bool(told) == bool(says)
    assert not says or "A run keeps its precision" in told, "`retry` has no --dtype"


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_what_is_asked_for_is_given(name: DTypeName) -> None:
    assert choose_dtype(name, cuda=False, hardware=PLAIN) == name


def test_refusals() -> None:
    with pytest.raises(SpecError, match="float16 runs on GPUs only: --gpus-per-actor 1"):
        choose_dtype("float16", cuda=False, hardware=PLAIN)
    with pytest.raises(SpecError, match="torch sees none"):
        choose_dtype("auto", cuda=True, hardware=PLAIN)


def test_this_machine_is_described() -> None:
    hardware = describe_hardware(cuda=False)
    assert hardware.compute_capability is None
    assert choose_dtype("auto", cuda=False) in {"bfloat16", "float32"}
