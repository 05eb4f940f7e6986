"""docs/benchmarks.md is what the results give, and every kind of result has its section."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current() -> None:
    command = [sys.executable, "benchmarks/document.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_figures_of_the_readme_are_those_of_the_page() -> None:
    told = " ".join((ROOT / "README.md").read_text().split("```")[0].split())
    over = []
    for name in ("peers-amx-again", "peers-amx"):
        peers = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert f"{peers['images']:,} photos" in told
        over.append({peer: f"{row['patchstream_over_it']:.1f}" for peer, row in peers["results"].items()})
    again, first = over
    assert f"{first['ray data, documented way']} times as fast as Ray Data's documented way" in told
    assert f"{again['daft']} and {first['daft']} times Daft" in told
    loop = "transformers bfloat16"
    assert f"{again[loop]} and {first[loop]} times a transformers loop in bfloat16" in told


def test_the_readme_says_which_precisions_it_compares() -> None:
    told = " ".join((ROOT / "README.md").read_text().split("```")[0].split())
    rows = json.loads((ROOT / "benchmarks" / "results" / "peers-amx.json").read_text())["results"]
    names = {"ray data, documented way": "Ray Data's documented way", "ray data, all cores": "Ray Data on all cores"}
    mixed, equal = told.split("In float32 as well: ")
    assert rows["patchstream"]["dtype"] == "bfloat16"
    assert "In bfloat16: " in mixed
    for peer, name in ({**names, "daft": "Daft"}).items():
        assert rows[peer]["dtype"] == rows["patchstream float32"]["dtype"] == "float32"
        ratio = rows["patchstream float32"]["images_per_s"] / rows[peer]["images_per_s"]
        assert f"{ratio:.1f} times {name}" in equal
    for name in ("Ray Data's documented way", "Daft"):
        assert f"{name} in float32" in mixed


def test_the_stages_of_a_job_are_medians_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    name = "end_to_end-vit-base-bfloat16.json"
    found = import_module("document").load(ROOT / "benchmarks" / "results")[name]
    for item, predict_s in zip(found["rounds"], (40.0, 48.0, 80.0), strict=True):
        item["job"]["stage_seconds"] = {"decode": 4.0, "predict": predict_s}
    assert "decode 10.0, predict 120.0." in import_module("sections").end_to_end(name, found)


def test_in_short_tells_of_every_run_and_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    document = import_module("document")
    results = document.load(document.RESULTS)
    (short,) = document.in_short(results)
    whole = results["end_to_end-vit-base-bfloat16.json"]
    rounds = ", ".join(f"{item['share']:.0%}" for item in whole["rounds"])
    assert f"vit-base in bfloat16 reaches {whole['share_of_ideal']:.0%} (the rounds: {rounds}) of decoding" in short
    for name in ("peers-amx.json", "peers-amx-again.json"):
        (line,) = [
            line for line in short.splitlines() if f"ours in bfloat16, times the images/s of others (`{name}`)" in line
        ]
        assert f"{results[name]['results']['daft']['patchstream_over_it']:.1f} (daft, float32)" in line
        assert "(transformers bfloat16)" in line
    (line,) = [line for line in short.splitlines() if "ours in float32, times" in line]
    assert "(ray data, documented way, float32)" in line
    assert "bfloat16" not in line


def test_the_page_draws_no_trend_from_scatter() -> None:
    """Through a server, what was added to the larger model was more by one way and less than nothing by the other."""
    section = (ROOT / "docs" / "benchmarks.md").read_text().split("## Through a Triton server")[1].split("\n## ")[0]
    assert "the share falls as the model grows" not in " ".join(section.split())
    assert "the scatter of the rounds is larger than what was added" in section


def test_the_scale_section_tells_the_rate_of_the_stream_from_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 rows in 12.9 s are not 3,575 a second."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text())
    section = import_module("sections").scale("scale.json", found)
    assert "| rows | seconds in all | rows/s of the stream, once all ran |" in section
    assert any(row["rows"] / row["seconds"] < row["rows_per_s"] / 2 for row in found["results"])


def test_scale_measures_by_default_as_many_rows_as_the_page_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    scale = import_module("scale")
    measured: list[int] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        measured.append(int(command[-1]))
        return SimpleNamespace(stdout="{}")

    monkeypatch.setattr(scale, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    monkeypatch.setattr(sys, "argv", ["scale.py"])
    scale.main()
    shown = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text())["results"]
    assert measured == [1_000, 10_000, 100_000, 1_000_000, 10_000_000]
    assert {row["rows"] for row in shown} <= set(measured)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("sources", ("-m", "benchmarks.sources", "--rows", "200")),
        ("decode", ("benchmarks/decode.py", "PHOTO", "--rounds", "1")),
    ],
)
def test_a_result_of_a_kind_without_a_section_is_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, command: tuple[str, ...]
) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "photo.jpg")
    arguments = [str(tmp_path / "photo.jpg") if argument == "PHOTO" else argument for argument in command]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["benchmark"] == kind
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    document = import_module("document")
    known = document.load(document.RESULTS)
    bare = {name: value for name, value in found.items() if name not in ("benchmark", "environment")}
    for result in (found, bare):
        page = document.compose({**known, "more.json": result})
        assert "## Other results\n\n- `benchmarks/results/more.json`" in page


def test_peers_that_ours_did_not_run_beside_have_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `peers.py --only daft` stores it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    row = {"dtype": "float32", "images_per_s": 4.0, "patchstream_over_it": None, "least_cosine_to_patchstream": None}
    found = {
        "benchmark": "peers", "images": 200, "dtype": "auto", "rounds": 1, "results": {"daft": row},
        "environment": {"cpu": "a CPU", "flags": ["avx512_bf16"], "cores": 2, "commit": "abc1234"},
    }  # fmt: skip
    page = import_module("document").compose({"peers-daft.json": found})
    assert "| daft | float32 | 4.00 | - | - |" in page
    assert "In short" not in page


def test_no_gpu_figures_means_that_the_page_says_so() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    measured = any(
        '"benchmark": "gpu"' in path.read_text() for path in (ROOT / "benchmarks" / "results").glob("*.json")
    )
    assert ("There are no GPU figures yet" in page) == (not measured)


def test_a_gpu_page_says_what_is_missing_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    row = {
        "model": "ViT-L/16", "dtype": "bfloat16", "kind": "bfloat16, trunk compiled", "batch": 256,
        "model_only": 4200.0, "ceiling_share": 0.66, "end_to_end": 4000.0, "end_to_end_share": 0.952,
        "call_batches": 2.0, "one_call_share": 0.981, "copy_over_compute": 0.012, "least_cosine": 0.99991,
        "attention": "CUDNN_ATTENTION",
    }  # fmt: skip
    found = {
        "environment": {"device": "NVIDIA H200", "cpu": "Intel Xeon", "cores": 16, "commit": "abc1234"},
        "ceilings": {"product_bfloat16_tflops": 780.0, "product_float8_tflops": "RuntimeError: no kernel"},
        "ceiling_at_the_end": {"product_bfloat16_tflops": 765.5},
        "products": {
            "qkv": {"bfloat16": 700.0, "float8_rows": 1200.0},
            "fc1_gelu": {"bfloat16": 500.0, "epilogue": 650.0},
        },
        "attention": {"CUDNN_ATTENTION": 400.0, "EFFICIENT_ATTENTION_BIAS": "RuntimeError: no kernel"},
        "correctness": [{"model": "ViT-L/16", "dtype": "bfloat16", "cls": 0.9999, "pooled": 0.9999}],
        "rates": [row, row | {"copy_over_compute": None}],
        "left_out": ["ViT-B/16 float8: time is up"],
        "wrong": ["ViT-L/16 float8 batch 256: a cosine of 0.5"],
    }
    page = import_module("sections").gpu("gpu.json", found)
    for said in (
        "again at the end: 765.5", "| bfloat16, trunk compiled | 256 |", "| cudnn |", "time is up", "a cosine of 0.5",
        "95%", "98% of 2", "0.99991", "| qkv | 700.0 | 1,200.0 | - |", "| fc1_gelu | 500.0 | - | 650.0 |",
        "cudnn 400.0, efficient with bias -", "NVIDIA H200 in a host with Intel Xeon, 16 cores",
        "98% of 2 | 0.01 | 0.99991", "98% of 2 | - | 0.99991",
    ):  # fmt: skip
        assert said in page
