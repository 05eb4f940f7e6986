"""What is chosen for a GPU: the same on every machine, with or without one."""

from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from support.checkpoints import make_checkpoint
from torch.nn.attention import SDPBackend

from pipeline.models import inspect_model, load_model
from pipeline.models.architecture import Architecture
from pipeline.models.gpu import COMPILE_FROM_S, Compiled, choose_batch, has_compiler, plan_gpu
from pipeline.models.network import TRUNKS
from pipeline.models.precision import Hardware, torch_dtype
from pipeline.predictors.torch_runner import compile_trunk

CUDNN = 91900
T4, A100, L4, H200, B200, RTX = (
    Hardware(compute_capability=capability, cudnn=CUDNN)
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
)
LONG = 1e12


@pytest.mark.parametrize(
    ("hardware", "dtype", "bias", "first"),
    [
        (H200, "bfloat16", False, "CUDNN_ATTENTION"),
        (A100, "bfloat16", False, "FLASH_ATTENTION"),
        (L4, "float8", False, "FLASH_ATTENTION"),
        (T4, "float16", False, "EFFICIENT_ATTENTION"),
        (H200, "bfloat16", True, "EFFICIENT_ATTENTION"),
        (H200, "float32", False, "EFFICIENT_ATTENTION"),
        (Hardware(compute_capability=(9, 0), cudnn=91501), "bfloat16", False, "CUDNN_ATTENTION"),
        (Hardware(compute_capability=(9, 0), cudnn=91500), "bfloat16", False, "FLASH_ATTENTION"),
        (Hardware(compute_capability=(9, 0)), "bfloat16", False, "FLASH_ATTENTION"),
        (B200, "bfloat16", False, "FLASH_ATTENTION"),
        (RTX, "float8", False, "FLASH_ATTENTION"),
    ],
)
def test_attention(hardware: Hardware, dtype: str, bias: bool, first: str) -> None:
    plan = plan_gpu(hardware, dtype, attention_bias=bias, work_gflop=0)
    assert ("CUDNN_ATTENTION" in plan.attention) == (first == "CUDNN_ATTENTION"), "not as a second choice either"
    assert plan.attention[0] == first
    assert plan.attention[-1] == "MATH", "one that takes everything must be left"
    assert all(hasattr(SDPBackend, name) for name in plan.attention)
    assert plan.graphs


def test_compiling_is_for_long_jobs_and_for_float8() -> None:
    def compiled(dtype: str, work_gflop: float) -> str:
        return plan_gpu(H200, dtype, attention_bias=False, work_gflop=work_gflop).compiled

    assert compiled("bfloat16", 0) == "nothing"
    assert compiled("bfloat16", 0.99 * COMPILE_FROM_S * 200_000) == "nothing"
    assert compiled("bfloat16", 1.01 * COMPILE_FROM_S * 200_000) == "trunk"
    assert compiled("float8", 0) == "blocks"
    assert compiled("float8", 1.01 * COMPILE_FROM_S * 200_000) == "trunk"
    for dtype in ("bfloat16", "float8"):
        plan = plan_gpu(H200, dtype, attention_bias=False, work_gflop=LONG, compiler=False)
        assert plan.compiled == "nothing"


@pytest.mark.parametrize("kind", ["vit-classifier", "beit-classifier"])
def test_compiled_blocks_share_their_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As dynamo sees it; what builds kernels from its graphs is left out."""
    info = inspect_model(str(make_checkpoint(tmp_path / kind, kind, image_size=32, patch_size=8)))
    model = load_model(info, dtype=torch_dtype("float8"), outputs=("cls",))
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model(pixels).cls
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        torch.compiler.reset()
        stats = torch._dynamo.utils.counters["stats"]
        stats.clear()
        compile_trunk(model.trunk, "blocks")
        found = model(pixels).cls
    assert len(model.trunk.blocks) > 2
    assert stats["unique_graphs"] == 1 + (model.trunk.prefix_block is not None)
    assert torch.equal(found, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("network", ["vit", "beit", "mixer"])
@pytest.mark.parametrize("what", ["nothing", "blocks", "trunk"])
def test_every_network_can_be_compiled(network: Literal["vit", "beit", "mixer"], what: Compiled) -> None:
    a = Architecture(
        network, width=8, depth=2, heads=2, mlp_width=16, patch_size=(8, 8), trained_size=(32, 32), epsilon=1e-6,
        token_mlp_width=8,
    )  # fmt: skip
    trunk = TRUNKS[network](a, a.grid((32, 32)))
    compile_trunk(trunk, what)  # compiled where it first runs
    parts = {"nothing": [], "blocks": list(trunk.blocks), "trunk": [trunk]}[what]
    assert all(part._compiled_call_impl is not None for part in parts)
    assert what == "trunk" or trunk._compiled_call_impl is None


def test_a_compiler_is_looked_for_in_path_and_the_headers_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    assert not has_compiler()
    (tmp_path / "gcc").touch(mode=0o755)
    assert has_compiler()
    (tmp_path / "Python.h").unlink()
    assert not has_compiler()


def test_the_smallest_batch_that_loses_nothing() -> None:
    assert choose_batch({64: 900.0, 128: 1000.0, 256: 1010.0}) == 128
    assert choose_batch({64: 900.0, 128: 1000.0, 256: 1200.0}) == 256
    assert choose_batch({256: 10.0}) == 256
