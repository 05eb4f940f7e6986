"""Which layers are chosen on which machine, and that each kind gives what the plain ones give."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint, worst_error

from pipeline.models import inspect_model, load_model
from pipeline.models.kernels import choose_linear, cpu_libraries, replace_linears
from pipeline.models.packed import EpilogueLinear, MklLinear
from pipeline.models.precision import Hardware
from pipeline.models.prefix import prefix_suffices

BOTH = frozenset({"mkl", "onednn", "onednn-bfloat16"})
INTEL, AMD = Hardware(cpu_vendor="GenuineIntel"), Hardware(cpu_vendor="AuthenticAMD")
NONE: frozenset[str] = frozenset()


@pytest.mark.parametrize(
    ("dtype", "device", "hardware", "libraries", "expected"),
    [
        ("float32", "cpu", INTEL, BOTH, "mkl"),
        ("float32", "cpu", AMD, BOTH, "onednn"),
        ("float32", "cpu", INTEL, frozenset({"onednn"}), "onednn"),
        ("float32", "cpu", Hardware(), NONE, "plain"),
        ("bfloat16", "cpu", INTEL, BOTH, "onednn"),
        ("bfloat16", "cpu", Hardware(), NONE, "plain"),
        ("bfloat16", "cpu", INTEL, frozenset({"mkl", "onednn"}), "plain"),
        ("float16", "cpu", INTEL, BOTH, "plain"),
        ("int8", "cpu", INTEL, BOTH, "int8"),
        ("bfloat16", "cuda", INTEL, BOTH, "plain"),
        ("float32", "cuda", INTEL, BOTH, "plain"),
        ("float8", "cuda", INTEL, BOTH, "float8"),
    ],
)
def test_choice(dtype: str, device: str, hardware: Hardware, libraries: frozenset[str], expected: str) -> None:
    assert choose_linear(dtype, device, hardware, libraries) == expected


H100, A100, L4, RTX = (Hardware(compute_capability=capability) for capability in ((9, 0), (8, 0), (8, 9), (12, 0)))


@pytest.mark.parametrize(
    ("dtype", "hardware", "activation", "expected"),
    [
        ("bfloat16", H100, "gelu_tanh", "epilogue"),
        ("bfloat16", H100, "gelu", "epilogue"),
        ("float16", H100, "gelu_tanh", "epilogue"),
        ("float16", H100, "gelu", "plain"),  # it would see the difference between the two forms
        ("float32", H100, "gelu", "plain"),
        ("float32", H100, "gelu_tanh", "plain"),
        ("bfloat16", H100, "quick_gelu", "plain"),
        ("bfloat16", A100, "gelu_tanh", "plain"),
        ("bfloat16", L4, "gelu", "plain"),
        ("bfloat16", RTX, "gelu_tanh", "plain"),
        ("float8", H100, "gelu", "float8"),
    ],
)
def test_gelu_goes_with_the_product_where_that_is_faster(
    dtype: str, hardware: Hardware, activation: str, expected: str
) -> None:
    assert choose_linear(dtype, "cuda", hardware, BOTH, activation) == expected


def test_on_a_cpu_both_forms_of_gelu_go_with_the_product() -> None:
    for activation in ("gelu", "gelu_tanh"):
        assert choose_linear("bfloat16", "cpu", INTEL, BOTH, activation) == "onednn"


def test_gelu_with_the_product_is_near_the_plain_one(tmp_path: Path) -> None:
    info = inspect_model(str(make_checkpoint(tmp_path / "siglip", "siglip")))
    assert info.network.activation == "gelu_tanh"
    plain, replaced = load_model(info, packed=False), load_model(info, packed=False)
    replace_linears(replaced.trunk, "epilogue")
    assert all(isinstance(block.fc1, EpilogueLinear) and block.fc1.activated for block in replaced.trunk.blocks)
    pixels = random_pixels(2)
    ours, theirs = replaced(pixels).pooled, plain(pixels).pooled
    # On this device it is the exact form, which is up to 0.0005 from the other.
    assert 0 < worst_error(ours, theirs) < 2e-3
    assert torch.cosine_similarity(ours, theirs, dim=1).min() > 0.99999


def random_pixels(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["vit-classifier", "beit", "dinov2-registers", "clip"])
@pytest.mark.parametrize("linear", ["mkl", "onednn"])
def test_every_kind_gives_the_same(kind: str, linear: str, tmp_path: Path) -> None:
    if linear not in cpu_libraries():
        pytest.skip(f"this torch has no {linear}")
    info = inspect_model(str(make_checkpoint(tmp_path / kind, kind)))
    plain, replaced = load_model(info, packed=False), load_model(info, packed=False)
    replace_linears(replaced.trunk, linear)  # type: ignore[arg-type]
    # A first batch that is not full, a full one, the smaller one at the end of a block, and the full one again.
    for count in (2, 3, 1, 3):
        pixels = random_pixels(count)
        ours, theirs = replaced.last_hidden_state(pixels), plain.last_hidden_state(pixels)
        assert worst_error(ours.flatten(0, 1), theirs.flatten(0, 1)) < 1e-4
        assert worst_error(replaced(pixels).pooled, plain(pixels).pooled) < 1e-4


def test_bfloat16_runs_where_onednn_refuses_it(tmp_path: Path) -> None:
    """As on a CPU without AVX-512: a run that GPUs made in bfloat16 is searched by picture there."""
    folder = make_checkpoint(tmp_path / "vit", "vit")
    code = (
        "import torch; from pipeline.models import inspect_model, load_model\n"
        f"model = load_model(inspect_model({str(folder)!r}), dtype=torch.bfloat16)\n"
        "print(tuple(model(torch.zeros(1, 224, 224, 3, dtype=torch.uint8)).cls.isfinite().shape))"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("(1, ")


@pytest.mark.skipif("mkl" not in cpu_libraries(), reason="this torch has no MKL")
def test_a_small_first_batch_does_not_keep_full_ones_from_the_fast_layout() -> None:
    layer = MklLinear(torch.nn.Linear(8, 4))
    for rows, laid_out_for in ((3, 3), (8, 8), (3, 8), (8, 8)):
        layer(torch.ones(1, rows, 8))
        assert layer.packed[1] == laid_out_for


@pytest.mark.parametrize(
    ("kind", "outputs", "enough"),
    [
        ("vit", {"cls", "pooled"}, True),
        ("vit-classifier", {"cls", "pooled"}, False),
        ("vit-classifier", {"cls", "logits"}, True),
        ("vit-classifier", {"logits"}, True),
        ("beit", {"cls", "pooled"}, False),
        ("beit", {"cls"}, True),
        ("beit-cls", {"cls", "pooled"}, True),
        ("deit-distilled", {"cls", "logits"}, True),
        ("dinov2-classifier", {"logits"}, False),
        ("dinov2-registers", {"cls"}, True),
        ("siglip", {"pooled"}, False),
        ("clip-projection", {"pooled"}, True),
    ],
)
def test_the_last_block_computes_only_what_is_read(kind: str, outputs: set[str], enough: bool, tmp_path: Path) -> None:
    info = inspect_model(str(make_checkpoint(tmp_path / kind, kind)))
    assert prefix_suffices(info.network, frozenset(outputs)) == enough
    assert not prefix_suffices(info.network, frozenset({*outputs, "patches"}))
    pixels = random_pixels(2)
    whole, read = load_model(info, packed=False), load_model(info, outputs=outputs)
    assert (read.trunk.prefix_block is not None) == enough
    whole.trunk.prefix_block = None
    expected, got = whole(pixels), read(pixels)
    for name in outputs:
        assert worst_error(getattr(got, name), getattr(expected, name)) < 1e-4, name
    assert got.pooled is None or "pooled" in outputs or info.network.head_input == "pooled"
    full = read.last_hidden_state(pixels)
    assert worst_error(full.flatten(0, 1), whole.last_hidden_state(pixels).flatten(0, 1)) < 1e-4
