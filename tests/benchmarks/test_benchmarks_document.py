"""docs/benchmarks.md is what the results give, and every kind of result has its section."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current() -> None:
    command = [sys.executable, "benchmarks/document.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_gpu_figures_means_that_the_page_says_so() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    measured = any(
        '"benchmark": "gpu"' in path.read_text() for path in (ROOT / "benchmarks" / "results").glob("*.json")
    )
    assert ("There are no GPU figures yet" in page) == (not measured)
