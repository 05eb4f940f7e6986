"""In what order the ceilings of a machine are measured."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(60)
def test_no_model_runs_after_the_decoders_have_set_their_malloc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    ceilings: Any = import_module("ceilings")
    measured: list[str] = []
    for name in ("forward", "compiled", "decode"):
        monkeypatch.setattr(ceilings, name, lambda *_, name=name: measured.append(name) or [])
    monkeypatch.setattr(sys, "argv", ["ceilings.py", str(tmp_path), "--parts", "decode", "forward", "compiled"])
    ceilings.main()
    assert measured[-1] == "decode"
    assert {"forward", "compiled"} < set(measured)
