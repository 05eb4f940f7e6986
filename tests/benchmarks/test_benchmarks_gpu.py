"""The benchmark for GPUs runs through where there is none, in small sizes, with nothing but torch and numpy."""

import json
import subprocess
import sys
from pathlib import Path

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
    assert found["left_out"] == []
    assert {"product_bfloat16_tflops", "product_float8_tflops", "copy_to_device_gb_per_s"} <= found["ceilings"].keys()
    assert {(row["model"], row["dtype"], row["compiled"]) for row in found["rates"]} == {
        (model, dtype, compiled)
        for model in ("tiny ViT", "tiny BEiT")
        for dtype, compiled in (("bfloat16", False), ("float8", True), ("bfloat16", True))
    }
    for row in found["rates"]:
        assert row["model_only"] > 0
        assert row["end_to_end"] > 0
        assert row["ceiling_share"] > 0
    least = {"bfloat16": 0.999, "float8": 0.99}
    for row in found["correctness"]:
        assert least[row["dtype"]] < row["cls"] <= 1.0001
        assert least[row["dtype"]] < row["pooled"] <= 1.0001


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu/run.py", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode != 0
    assert "--tiny" in done.stderr
