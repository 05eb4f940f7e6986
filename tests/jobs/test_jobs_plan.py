"""`patchstream plan`: from a source that is measured, and from a run that has been."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from jobs.cli import run_command
from jobs.plan import COMMANDS, parse_count, readable
from schemas.attempt import AttemptDevice, AttemptRecord, StageSeconds
from schemas.errors import OutputError, SourceError, SpecError

SIDE = 32
app = typer.Typer()
app.command("plan")(COMMANDS["plan"])
app.command("other")(lambda: None)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("model") / "vit", "vit-classifier", image_size=SIDE, patch_size=8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(20):
        pixels = generator.integers(0, 256, (200, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def figures(result: Result) -> dict[str, float]:
    assert result.exit_code == 0, result.output or result.exception
    return {step["name"]: step["value"] for step in json.loads(result.stdout)["steps"]}


def test_from_a_source(pictures: Path, checkpoint: Path) -> None:
    found = figures(run(str(pictures), "--model", str(checkpoint), "--images", "1e9", "--labels", "3", "--json"))
    mean = np.mean([path.stat().st_size for path in pictures.iterdir()])
    assert found["read"] == pytest.approx(1e9 * mean)
    assert found["output"] > 1e9 * 2 * 96 * 4
    assert found["shards"] == 10
    # A 300 × 200 PNG takes between a tenth of a millisecond and a tenth of a second of a core.
    decode_s = found["CPUs for each device"] / found["images/s a device"]
    assert 1e-4 < decode_s < 0.1


def test_sizes_that_no_listing_tells_are_those_of_what_was_fetched(
    pictures: Path, checkpoint: Path, tmp_path: Path
) -> None:
    table = tmp_path / "addresses.csv"
    table.write_text("uri\n" + "\n".join(str(path) for path in sorted(pictures.iterdir())))
    found = figures(run(str(table), "--model", str(checkpoint), "--images", "1e6", "--json"))
    assert found["read"] == pytest.approx(1e6 * np.mean([path.stat().st_size for path in pictures.iterdir()]))


def test_shows_its_arithmetic(pictures: Path, checkpoint: Path) -> None:
    result = run(str(pictures), "--model", str(checkpoint), "--images", "1,000,000", "--device", "h100", "--hours", "2")
    assert result.exit_code == 0, result.output
    assert "1,000,000 images" in result.stdout
    assert "20 images listed, 20 of them fetched and decoded here" in result.stdout
    lines = [line for line in result.stdout.splitlines() if "   = " in line]
    assert len(lines) >= 14
    assert any("989 TFLOP/s × 0.5 ÷" in line for line in lines)
    assert any(line.endswith("1 actors × 0.25 GiB") for line in lines), "256 MiB beside the weights"


def test_features_and_precision_change_the_output(pictures: Path, checkpoint: Path) -> None:
    common = (str(pictures), "--model", str(checkpoint), "--images", "1000000", "--json")
    both, one, half = (
        figures(run(*common, *options))["output"]
        for options in ((), ("--features", "cls"), ("--feature-dtype", "float16"))
    )
    assert both - one == pytest.approx(1e6 * 96 * 4)
    assert both - half == pytest.approx(1e6 * 2 * 96 * 2)


SAMPLED = (
    *("--include", "*/1?.png", "--exclude", "*/10.png"),
    *("--uri-column", "u", "--image-column", "i", "--revision", "v1"),
)


def test_what_is_sampled_is_chosen_as_for_embed(pictures: Path, checkpoint: Path) -> None:
    asked = (str(pictures), "--model", str(checkpoint))
    whole, part = figures(run(*asked, "--json")), run(*asked, "--image-size", "16x24", *SAMPLED, "--json")
    assert figures(part)["forward pass"] < 0.5 * whole["forward pass"]  # 6 patches for 16
    assert "9 images listed, 9 of them" in json.loads(part.stdout)["origin"]


def test_a_benchmark_samples_as_embed_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []

    def look(spec: Any, *_: Any) -> None:
        looked.append(spec)
        raise SpecError("enough")

    monkeypatch.setattr("jobs.benchmark.look", look)
    assert run_command(["benchmark", "x", "--model", "m", "--image-size", "224x320", *SAMPLED]) == 2
    (spec,) = looked
    assert (spec.image_size, spec.revision, spec.uri_column, spec.image_column) == ((224, 320), "v1", "u", "i")
    assert (spec.include, spec.exclude) == (("*/1?.png",), ("*/10.png",))


def test_a_benchmark_waits_for_machines_as_a_job_does(
    pictures: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def connect(address: str | None, **options: Any) -> None:
        asked.update(options)
        raise SpecError("enough")

    monkeypatch.setattr("cluster.session.ray_session", connect)
    given = ("--gpus-per-actor", "1", "--actors", "2:4", "--dtype", "float32", "--cluster-wait", "900")
    assert run_command(["benchmark", str(pictures), "--model", str(checkpoint), *given]) == 2
    assert (asked["bundles"], asked["wait_s"]) == ([{"GPU": 1.0, "CPU": 1.0}] * 2, 900)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A run of 100 images: 2 ms of decoding, 4 ms of an actor each."""
    from support.runs import RunContent, write_run

    directory = write_run(tmp_path / "run", RunContent({"cls": np.ones((100, 16), np.float32)}))
    for path in (directory / "manifest").glob("*.parquet"):
        table = pq.read_table(path)
        sizes = pa.array([50_000] * table.num_rows, pa.int64())
        pq.write_table(table.set_column(table.column_names.index("size"), "size", sizes), path)
    (directory / "attempts").mkdir()
    for number, images in ((1, 60), (2, 40)):
        write_attempt(directory, number, images, StageSeconds(fetch=9.0, decode=0.002 * images, predict=0.004 * images))
    return directory


def write_attempt(directory: Path, number: int, images: int, seconds: StageSeconds) -> None:
    record = AttemptRecord(
        attempt=number, shard_index=0, shard_count=1, started="2026-01-01T00:00:00+00:00", host="h", pid=1,
        status="done", images=images, stage_seconds=seconds,
    )  # fmt: skip
    (directory / "attempts" / f"{number:06d}.json").write_text(record.model_dump_json())


def test_from_a_run(measured: Path) -> None:
    found = figures(run("--run", str(measured), "--images", "1000000", "--devices", "4", "--json"))
    assert found["images/s a device"] == pytest.approx(250)
    assert found["CPUs for each device"] == pytest.approx(0.5)
    assert found["time"] == pytest.approx(1000 / 3600)
    assert found["read"] == pytest.approx(5e10)
    written = sum(path.stat().st_size for path in (measured / "images").glob("*.parquet"))
    assert found["output"] == pytest.approx(1e6 * written / 100)
    assert "without that of the actors" in run("--run", str(measured)).stdout


def test_parts_of_a_run_are_counted_from_their_names(measured: Path) -> None:
    """Nothing is opened, and what is no part of the run is not counted."""
    before = figures(run("--run", str(measured), "--json"))["output"]
    for path in (measured / "images").iterdir():
        path.write_bytes(b"x" * path.stat().st_size)
    (measured / "images" / "mine.parquet").write_bytes(b"x" * 1_000_000)
    assert figures(run("--run", str(measured), "--json"))["output"] == before


def test_the_disk_that_search_takes_is_planned(measured: Path, pictures: Path, checkpoint: Path) -> None:
    """As much as the matrix that a search of the run leaves there, but for the headers of its files."""
    from pipeline.retrieval.store import FeatureStore

    planned = figures(run("--run", str(measured), "--images", "100", "--json"))["vectors for search"]
    FeatureStore.open(str(measured)).load("cls")
    kept = sum(path.stat().st_size for path in (measured / "index" / "_matrix").glob("*/*.npy"))
    assert planned == kept - 3 * 128 == 100 * (16 * 4 + 12)
    common = (str(pictures), "--model", str(checkpoint), "--images", "1000", "--json")
    assert figures(run(*common))["vectors for search"] == 1000 * (96 * 4 + 12)
    half = ("--features", "pooled", "--feature-dtype", "float16")
    assert figures(run(*common, *half))["vectors for search"] == 1000 * (96 * 2 + 12)


@pytest.mark.parametrize(
    ("ran_s", "tasks", "rate"), [(20.0, 2, 2.5), (1.0, 2, 1 / (0.002 + 0.004)), (20.0, None, 1 / (0.002 + 0.004))]
)
def test_from_a_run_on_cpus_the_cores_are_those_that_predict(
    measured: Path, ran_s: float, tasks: int | None, rate: float
) -> None:
    """Two cores gave 5 images a second: 0.4 core-seconds an image, decoding included. In a short run that is mostly
    start-up, and on a cluster the cores are not known: there the stages' own seconds count."""
    for path in (measured / "attempts").glob("*.json"):
        record = AttemptRecord.model_validate_json(path.read_bytes())
        record.device, record.decode_tasks, record.images_per_s = "cpu", tasks, 5.0
        record.startup_s, record.wall_s = 10.0, 10.0 + ran_s
        path.write_text(record.model_dump_json())
    found = figures(run("--run", str(measured), "--images", "1000000", "--devices", "100", "--json"))
    assert found["images/s a device"] == pytest.approx(rate)
    assert found["cores"] == 100
    assert found["throughput"] == pytest.approx(100 * rate)


@pytest.mark.parametrize(("kind", "name"), [("gpu", "on an actor"), ("triton", "one Triton server that all share,")])
def test_of_a_run_on_two_kinds_of_device_the_one_of_most_images_counts(
    measured: Path, kind: AttemptDevice, name: str
) -> None:
    """60 images on a GPU; 40 failures that were tried again on CPUs, where everything took ten times as long."""
    devices: tuple[tuple[int, AttemptDevice, float], ...] = ((1, kind, 1.0), (2, "cpu", 10.0))
    for number, device, factor in devices:
        path = measured / "attempts" / f"{number:06d}.json"
        record = AttemptRecord.model_validate_json(path.read_bytes())
        record.device = device
        record.stage_seconds.decode *= factor
        record.stage_seconds.predict *= factor
        path.write_text(record.model_dump_json())
    result = run("--run", str(measured), "--images", "1000000", "--devices", "4", "--json")
    assert figures(result)["images/s a device"] == pytest.approx(250)
    assert figures(result)["CPUs for each device"] == pytest.approx(0.5)
    assert "1 attempt of " in json.loads(result.stdout)["origin"]
    assert f"{name} as in that run" in result.stdout


def test_a_run_that_did_nothing_measures_nothing(measured: Path) -> None:
    shutil.rmtree(measured / "attempts")
    assert isinstance(run("--run", str(measured)).exception, OutputError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SOURCE"], "needs SOURCE and --model"),
        (["SOURCE", "--model", "MODEL", "--device", "abacus"], "--device abacus"),
        (["SOURCE", "--model", "MODEL", "--images", "many"], "--images many"),
        (["SOURCE", "--model", "MODEL", "--images", "2e9"], "1,000,000,000"),
        (["SOURCE", "--model", "MODEL", "--hours", "nan"], "--hours nan: expected a number above 0"),
        (["SOURCE", "--model", "MODEL", "--hours", "inf"], "--hours inf: expected a number above 0"),
        (["SOURCE", "--run", "RUN"], "leave out SOURCE"),
        (["--run", "RUN", "--device", "l4", "--decode", "fast"], "leave out --device, --decode"),
        (["--run", "RUN", "--features", "cls", "--labels", "1"], "leave out --features, --labels"),
        (["--run", "RUN", "--feature-dtype", "float32"], "leave out --feature-dtype"),
    ],
)
def test_refused(pictures: Path, checkpoint: Path, arguments: list[str], message: str) -> None:
    places: dict[str, Any] = {"SOURCE": pictures, "MODEL": checkpoint}
    result = run(*(str(places.get(argument, argument)) for argument in arguments))
    assert isinstance(result.exception, SpecError)
    assert message in str(result.exception)


def test_pictures_that_cannot_be_decoded_are_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    result = run(str(tmp_path), "--model", str(checkpoint))
    assert isinstance(result.exception, SourceError)
    assert "none of 1 sampled images could be decoded" in str(result.exception)


@pytest.mark.parametrize(("text", "count"), [("250000", 250_000), ("1e9", 10**9), ("2_000", 2000), ("1,500", 1500)])
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "1.5", "nan", "inf", "ten"])
def test_no_counts(text: str) -> None:
    with pytest.raises(SpecError, match="--images"):
        parse_count(text)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (1.5e12, "bytes", "1.5 TB"),
        (12.0, "bytes", "12 bytes"),
        (48.0, "h", "2 days"),
        (0.25, "h", "15 min"),
        (1234.6, "images/s", "1,235 images/s"),
        (0.19, "cores", "0.19 cores"),
        (3, "", "3"),
    ],
)
def test_readable(value: float, unit: str, shown: str) -> None:
    assert readable(value, unit) == shown


def test_importing_the_command_imports_nothing_heavy() -> None:
    program = "import sys, jobs.plan; print({'torch', 'ray', 'numpy', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
