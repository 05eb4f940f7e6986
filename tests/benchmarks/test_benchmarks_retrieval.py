"""What the rows of the benchmark of retrieval measure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(200)
def test_the_row_matrix_makes_the_matrix_each_time(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        command = [sys.executable, "benchmarks/retrieval.py", "--rows", "400", "--dim", "32", "--folder", str(tmp_path)]
        command += ["--only", "matrix", "--json", str(tmp_path / "found.json")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        measured = json.loads((tmp_path / "found.json").read_text())["commands"]
        assert list(measured) == ["matrix"]
        (vectors,) = tmp_path.glob("run-400-32/index/_matrix/cls-*/vectors.npy")
        made.append(vectors.stat().st_mtime_ns)
    assert made[0] != made[1]
