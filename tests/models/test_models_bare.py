"""The networks need torch alone: a bare GPU machine has no ray, pydantic or pyarrow."""

import subprocess
import sys
from pathlib import Path

FOREIGN = ("ray", "pydantic", "pyarrow", "fsspec", "transformers", "timm", "typer", "rich", "psutil", "huggingface_hub")
CODE = f"""
import sys
for name in {FOREIGN!r}:
    sys.modules[name] = None
from pipeline.models import assemble, gpu
from pipeline.predictors import torch_runner
"""


def test_networks_import_without_the_rest() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
