"""The benchmark for GPUs runs through where there is none, in small sizes, with nothing but torch and numpy."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.placement import place
from pipeline.predictors.torch_runner import Runner
from schemas.machines import Machines

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("ray", "pydantic", "pyarrow", "fsspec", "transformers", "timm", "typer", "rich", "psutil", "huggingface_hub")
CODE = f"""
import runpy, sys
for name in {FOREIGN!r}:
    sys.modules[name] = None
sys.argv = ["run.py", "--tiny", "--device", "cpu", "--json", sys.argv[1]]
runpy.run_path("benchmarks/gpu/run.py", run_name="__main__")
"""


def test_runs_through_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(out)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["left_out"] == found["wrong"] == []
    assert found["environment"]["cpu"]
    assert found["environment"]["cores"] == len(os.sched_getaffinity(0))
    assert set(found["products"]) == {"qkv", "out", "fc1", "fc2", "fc1_gelu"}
    assert set(found["products"]["fc1"]) == {"bfloat16", "float8_rows", "float8_tensor"}
    assert found["attention"]["FLASH_ATTENTION"] > 0
    assert found["attention"]["FLASH_ATTENTION_BIAS"] > 0
    assert found["products"]["fc1_gelu"]["epilogue"] > 0
    assert {"product_bfloat16_tflops", "product_float8_tflops", "copy_to_device_gb_per_s"} <= found["ceilings"].keys()
    assert found["ceiling_at_the_end"]["product_bfloat16_tflops"] > 0
    kinds = ["bfloat16", "float8, blocks compiled", "bfloat16, trunk compiled", "float8, trunk compiled"]
    assert {(row["model"], row["kind"]) for row in found["rates"]} == {
        ("tiny ViT", "bfloat16, plain layers"),
        *((model, kind) for model in ("tiny ViT", "tiny BEiT") for kind in kinds),
    }
    for row in found["rates"]:
        assert row["model_only"] > 0
        assert row["end_to_end"] > 0
        assert row["ceiling_share"] > 0
        assert row["least_cosine"] > 0.999
        assert row["one_call"] > 0
        assert row["call_batches"] == 2
        assert row["attention"] == "FLASH_ATTENTION"
        assert row["graphs"] is False
    least = {"bfloat16": 0.999, "float8": 0.99}
    for row in found["correctness"]:
        assert least[row["dtype"]] < row["cls"] <= 1.0001
        assert least[row["dtype"]] < row["pooled"] <= 1.0001


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu/run.py", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode != 0
    assert "--tiny" in done.stderr


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The benchmark's modules, in this process and without their ceilings."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    modules = SimpleNamespace(**{name: import_module(name) for name in ("run", "device", "networks", "rates")})
    monkeypatch.setattr(modules.run, "measure_device", lambda kinds, bench, report, tiny: None)
    return modules


def started(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    command = ["run.py", "--tiny", "--device", "cpu", "--models", "tiny ViT", "--batches", "2", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    gpu.run.main()


def test_results_that_are_not_those_of_a_plain_call_are_wrong(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Mixed(Runner):
        def run(self, pixels: Any) -> list[torch.Tensor]:
            return [result.roll(1, dims=0) for result in super().run(pixels)]

    monkeypatch.setattr(gpu.rates, "Runner", Mixed)
    with pytest.raises(SystemExit, match="wrong results: tiny ViT bfloat16 batch 2: a cosine of"):
        started(gpu, monkeypatch, "--json", str(tmp_path / "gpu.json"))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found["wrong"]) == len(found["rates"]) == 5


def test_a_network_that_is_far_from_float32_is_wrong(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is timed and what it is held against multiply in the same way."""
    product = gpu.rates.direct

    def far(model: Any, *arguments: Any) -> Any:
        return tuple(result.roll(1, dims=1) for result in product(model, *arguments))

    monkeypatch.setattr(gpu.rates, "direct", far)
    with pytest.raises(SystemExit, match=r"to float32 was expected"):
        started(gpu, monkeypatch, "--json", str(tmp_path / "gpu.json"))


def test_a_run_without_one_rate_is_no_success(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise TypeError("sdpa_kernel() got an unexpected keyword argument")

    monkeypatch.setattr(gpu.rates, "Runner", refuse)
    with pytest.raises(SystemExit, match=r"not one rate: .*unexpected keyword"):
        started(gpu, monkeypatch)


def failed_capture(*arguments: Any, **options: Any) -> Any:
    """As torch's own: the end of a capture raises over what went wrong in it."""
    try:
        raise ValueError("no plan\nfor these shapes")
    except ValueError:
        raise torch.AcceleratorError("CUDA error: failed due to a previous error during capture")  # noqa: B904


def test_what_lies_beneath_a_failure_is_told(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu.rates, "Runner", failed_capture)
    with pytest.raises(SystemExit, match="not one rate"):
        started(gpu, monkeypatch, "--json", str(out))
    captured = capsys.readouterr()
    expected = "bfloat16: AcceleratorError: CUDA error: failed due to a previous error during capture; beneath it "
    expected += "ValueError: no plan for these shapes"
    assert json.loads(out.read_text())["left_out"][0].endswith(expected)
    assert expected in captured.out
    assert "in failed_capture" in captured.err


def test_what_lies_beneath_a_ceiling_that_fails_is_told(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()  # `gpu` leaves them out
    report = gpu.run.Report(None)
    monkeypatch.setitem(gpu.run.MEASURES, "ceilings", failed_capture)
    gpu.run.measure_device(["ceilings"], None, report, tiny=True)
    assert report.found["left_out"][0].startswith("ceilings: AcceleratorError: ")
    assert report.found["left_out"][0].endswith("beneath it ValueError: no plan for these shapes")
    assert "in failed_capture" in capsys.readouterr().err


def test_not_a_number_is_wrong(gpu: SimpleNamespace) -> None:
    fine, broken = torch.ones(2, 4), torch.full((2, 4), torch.nan)
    for ours in ((fine, broken), (broken, fine)):
        assert not gpu.rates.least_cosine(ours, (fine, fine)) >= 0


def test_times_are_of_pictures_and_not_of_black(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    black: list[bool] = []

    class Seen(Runner):
        def _compute(self, slot: int) -> None:
            black.append(not self._device[slot].flatten(1).any(dim=1).all())
            super()._compute(slot)

    monkeypatch.setattr(gpu.rates, "Runner", Seen)
    started(gpu, monkeypatch)
    assert len(black) > 60
    assert sum(black) == 5, "but for the padded batch of each comparison"


def test_what_matters_comes_first_and_is_stored_at_once(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, others = gpu.run.steps(["L", "B"], [64, 128, 256], compiler=True)
    rest = ["float8, blocks compiled", "bfloat16, trunk compiled", "float8, trunk compiled", "bfloat16"]
    assert [step.kind for step in first] == ["bfloat16", "bfloat16, plain layers", *rest]
    assert [str(step) for step in others] == [f"B {kind}" for kind in ("bfloat16", *rest)]
    assert [step.batches for step in others] == [(256,)] * 4 + [(128, 64)]
    rates, rows = gpu.rates.Subject.rates, iter(range(2))

    def cut_short(subject: Any, batch: int) -> Any:
        if next(rows) == 1:
            raise KeyboardInterrupt
        return rates(subject, batch)

    monkeypatch.setattr(gpu.rates.Subject, "rates", cut_short)
    with pytest.raises(KeyboardInterrupt):
        started(gpu, monkeypatch, "--json", str(tmp_path / "gpu.json"))
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rates"]) == 1


def test_what_is_left_out_is_said(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {(step.dtype, step.compiled) for step in gpu.run.steps(["L"], [256], compiler=False)[0]}
    assert kinds == {("bfloat16", "nothing"), ("float8", "nothing")}, "float8 runs without a compiler as well"
    with pytest.raises(SystemExit):
        started(gpu, monkeypatch, "--models", "VIT-L/16")
    assert "--models VIT-L/16: unknown; there are tiny ViT, tiny BEiT" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"not one rate: .*time is up"):
        started(gpu, monkeypatch, "--minutes", "0")
    assert "left out: tiny ViT bfloat16: time is up" in capsys.readouterr().out


def test_nothing_is_compiled_that_would_end_too_late(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.device.time, "monotonic", lambda: 0.0)
    bench = gpu.device.Bench("cpu", 6, 0.02)
    assert not bench.late(compiled=True)
    bench.longest_compile_s = 100.0
    monkeypatch.setattr(gpu.device.time, "monotonic", lambda: 261.0)
    assert bench.late(compiled=True)
    assert not bench.late()


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_the_device_is_made_current(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, device: str, index: int
) -> None:
    """Torch's own check of what it is given runs; the call into the driver behind it does not."""
    current: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", current.append, raising=False)
    gpu.device.Bench(device, 6, 0.02)
    assert current == [index]


def test_the_commit_is_that_of_the_files_or_unknown(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = gpu.device.current_commit()
    monkeypatch.chdir(tmp_path)
    assert gpu.device.current_commit() == here
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.device.current_commit() == "unknown"
    bench = gpu.device.Bench("cpu", 1, 0.02)
    assert gpu.device.environment(bench, None)["commit"] == "unknown"
    assert gpu.device.environment(bench, "abc1234")["commit"] == "abc1234"


@pytest.mark.parametrize("cores", [16, 32])
def test_calls_are_as_long_as_those_of_an_actor(gpu: SimpleNamespace, cores: int) -> None:
    machines = Machines(cpus=cores, gpus=1, object_store_bytes=cores << 30)
    for side, rows in gpu.networks.CALL_ROWS.items():
        placement = place(
            machines, rows=10**7, actors=None, gpus_per_actor=1.0, batch_size=None, pixel_bytes=side * side * 3,
            model_bytes=2 << 30, image_gflop=120.0,
        )  # fmt: skip
        assert placement.block_rows == rows


def test_the_first_pictures_are_the_same_for_any_count_and_differ(gpu: SimpleNamespace) -> None:
    few, many = gpu.networks.pictures(3, (8, 8)), gpu.networks.pictures(9, (8, 8))
    assert (few == many[:3]).all()
    assert len({picture.tobytes() for picture in many}) == 9


@pytest.mark.parametrize(
    ("allowed", "taken"), [(("FLASH_ATTENTION", "MATH"), "FLASH_ATTENTION"), (("CUDNN_ATTENTION", "MATH"), "MATH")]
)
def test_the_attention_that_ran_is_told_and_not_the_one_that_was_wished_for(
    gpu: SimpleNamespace, allowed: tuple[str, ...], taken: str
) -> None:
    """Torch passes over a kernel that does not fit, as cuDNN's on this device, without a word."""
    a = gpu.networks.vit(gpu.networks.TINY, 32)
    bench = gpu.device.Bench("cpu", 1, 0.02)
    used = Runner(
        lambda pixels: (pixels.float(),), batch=2, shape=(4, 4, 3), device=bench.device, graphs=False, attention=allowed
    )
    assert used.attention == allowed
    assert gpu.rates.attention_taken(used, a, bench) == taken
