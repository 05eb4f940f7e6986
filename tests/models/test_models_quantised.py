"""The arithmetic of 8-bit layers, and how far a trained network in 8 bits is from float32."""

import numpy as np
import pytest
import torch
from support.testdata import needs_testdata, photos, trained_vit

from pipeline.models import choose_dtype, inspect_model, load_model
from pipeline.models.architecture import Architecture
from pipeline.models.kernels import replace_linears
from pipeline.models.layers import ACTIVATIONS
from pipeline.models.precision import Hardware, dtype_name, torch_dtype
from pipeline.models.quantised import (
    ActivatedFloat8Linear,
    Float8Linear,
    Int8Linear,
    quantise_activated,
    quantise_float8,
    quantise_int8,
    scaled_product,
)
from pipeline.models.vit import ViT
from schemas.errors import SpecError

H100 = Hardware(compute_capability=(9, 0))


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * torch.logspace(-3, 3, count)[:, None]


def test_int8_is_the_nearest_number_for_each_row() -> None:
    x = torch.cat([rows(9, 64), torch.zeros(1, 64)])
    q, scale = quantise_int8(x)
    assert q.dtype == torch.int8
    assert scale.shape == (10, 1)
    assert q[:9].abs().amax(dim=1).eq(127).all()
    assert ((q * scale - x).abs() <= scale / 2 * 1.0001).all()
    assert q[9].eq(0).all()


def test_float8_keeps_three_bits_of_every_number_and_uses_the_whole_range() -> None:
    x = torch.cat([rows(9, 64), torch.zeros(1, 64)])
    q, scale = quantise_float8(x)
    assert q.dtype == torch.float8_e4m3fn
    assert q.float()[:9].abs().amax(dim=1).eq(448).all()
    error = (q.float() * scale - x).abs()
    # Half a unit in the last of four significant bits; below 2⁻⁶ the steps are 2⁻⁹.
    assert (error <= torch.maximum(x.abs() / 16, scale * 2**-10) * 1.001).all()
    assert torch.isfinite(q.float()).all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_an_activation_is_computed_once_while_it_is_quantised(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    activate = ACTIVATIONS[activation]  # type: ignore[index]

    def counted(x: torch.Tensor) -> torch.Tensor:
        computed.append(x.numel())
        return activate(x)

    monkeypatch.setitem(ACTIVATIONS, activation, counted)  # type: ignore[misc]
    around_the_least = torch.linspace(-1.5, 0.5, 64).expand(3, 64)
    x = torch.cat([rows(9, 64), -rows(9, 64).abs(), around_the_least, torch.zeros(1, 64)]).to(torch.bfloat16)
    q, scale = quantise_activated(x, activation)
    assert sorted(computed) == [len(x), x.numel()]
    exact = activate(x.float())
    assert torch.isfinite(q.float()).all()
    assert (scale * 448 >= exact.abs().amax(dim=1, keepdim=True) * 0.999999).all(), "nothing may be cut off"
    error = (q.float() * scale - exact).abs()
    assert (error <= torch.maximum(exact.abs() / 16, scale * 2**-10) * 1.001).all()
    same = x.amax(dim=1) > 0.5
    assert torch.allclose(scale[same], quantise_float8(exact)[1][same])
    assert same.sum() >= 5


def test_in_a_block_the_activation_goes_to_the_layer_that_quantises_it() -> None:
    architecture = Architecture("vit", width=32, depth=2, heads=2, mlp_width=64, patch_size=(4, 4),
                                trained_size=(8, 8), epsilon=1e-6)  # fmt: skip
    torch.manual_seed(0)
    trunk = ViT(architecture, (2, 2)).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 5, 32).to(torch.bfloat16)
    expected = trunk.blocks[0](x)
    replace_linears(trunk, "float8")
    block = trunk.blocks[0]
    assert (type(block.fc1), type(block.fc2)) == (Float8Linear, ActivatedFloat8Linear)
    assert torch.cosine_similarity(block(x).float().flatten(), expected.float().flatten(), dim=0) > 0.999


@pytest.mark.parametrize("layer", [Int8Linear, Float8Linear])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_are_near_the_plain_one(layer: type[torch.nn.Module], bias: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(96, 64, bias=bias).requires_grad_(False)
    x, residual = torch.randn(2, 17, 96), torch.randn(2, 17, 64)
    dtype = torch.bfloat16 if layer is Float8Linear else torch.float32
    if layer is Float8Linear:
        plain, x, residual = plain.to(dtype), x.to(dtype), residual.to(dtype)
    eight = layer(plain)
    expected = plain(x).float()
    allowed = 0.06 if layer is Float8Linear else 0.02
    assert (eight(x).float() - expected).norm() < allowed * expected.norm()
    assert (eight.plus(x, residual).float() - expected - residual.float()).norm() < allowed * expected.norm()
    activated = layer(plain, "gelu")(x).float()
    assert (activated - torch.nn.functional.gelu(expected)).norm() < allowed * expected.norm()


@pytest.mark.parametrize("count", [1, 399, 400, 401, 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_rows_do_not_depend_on_those_beside_them(count: int, bias: bool) -> None:
    plain = torch.nn.Linear(37, 21, bias=bias).requires_grad_(False)
    weight, of_columns = quantise_int8(plain.weight)
    x = rows(count, 37).view(count, 1, 37).expand(count, 2, 37)[:, :1]
    small, of_rows = quantise_int8(x[:, 0])
    expected = (small.double() @ weight.double().t()) * of_rows.double() * of_columns.double().t()
    if bias:
        expected = expected + plain.bias.double()
    found = Int8Linear(plain)(x)[:, 0].double()
    assert ((found - expected).abs().amax(dim=1) <= 1e-5 * expected.abs().amax(dim=1)).all()


def test_the_emulated_product_is_that_of_the_numbers() -> None:
    a, scale_a = quantise_float8(rows(5, 32))
    b, scale_b = quantise_float8(rows(7, 32, seed=1))
    product = scaled_product(a, scale_a, b.t(), scale_b.reshape(1, -1), None)
    exact = (a.double() * scale_a.double()) @ (b.double() * scale_b.double()).T
    assert product.dtype == torch.bfloat16
    assert torch.allclose(product.double(), exact, rtol=2**-7, atol=0)


def test_where_eight_bits_are_allowed() -> None:
    vnni = Hardware(frozenset({"avx512f", "avx512_vnni"}))
    assert choose_dtype("int8", cuda=False, hardware=vnni) == "int8"
    assert choose_dtype("float8", cuda=True, hardware=H100) == "float8"
    assert dtype_name(torch_dtype("float8")) == "float8"
    for dtype, cuda, hardware, said in (
        ("int8", False, Hardware(frozenset({"avx512f"})), "no VNNI or AMX"),
        ("int8", True, H100, "use float8 or bfloat16"),
        ("float8", False, vnni, "runs on GPUs only"),
        ("float8", True, Hardware(compute_capability=(8, 0)), "8.9 or later"),
    ):
        with pytest.raises(SpecError, match=said):
            choose_dtype(dtype, cuda=cuda, hardware=hardware)  # type: ignore[arg-type]


@needs_testdata
@pytest.mark.parametrize(("dtype", "least"), [("int8", 0.996), ("float8", 0.985)])
def test_distance_of_a_trained_network_on_photos(dtype: str, least: float) -> None:
    from pipeline.images.decode import DecodeSpec, decode_into
    from pipeline.images.formats import prepare_process

    prepare_process()
    info = inspect_model(str(trained_vit()))
    pixels = np.empty((12, 224, 224, 3), np.uint8)
    for out, file in zip(pixels, photos()[::17], strict=False):
        decode_into(file.read_bytes(), out, DecodeSpec(info.preprocessing, "exact", 10**9))
    exact, eight = (load_model(info, dtype=torch_dtype(name)) for name in ("float32", dtype))
    ours, theirs = eight(torch.from_numpy(pixels)), exact(torch.from_numpy(pixels))
    for name in ("cls", "pooled", "logits"):
        cosines = torch.cosine_similarity(getattr(ours, name), getattr(theirs, name), dim=1)
        assert least < cosines.min() < 0.9999, name


def test_a_mixer_has_no_layers_for_it() -> None:
    from pipeline.models.mixer import Mixer

    with pytest.raises(SpecError, match="MLP-Mixer runs in float32"):
        replace_linears(Mixer.__new__(Mixer), "int8")
