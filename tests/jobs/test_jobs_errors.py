"""Wrong use: exit code 2, one message with what was given, the rule and the fix, no traceback."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import run_command
from jobs.demo import draw
from schemas.spec import build_spec

MODEL = Path(draw.__file__).parent / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    draw.write_pictures(tmp_path / "in", 3, seed=1)
    return tmp_path / "in"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Standard error of a command that must end with code 2."""
    capsys.readouterr()
    code = run_command([str(argument) for argument in arguments])
    shown = capsys.readouterr().err
    assert code == 2, shown
    assert "Traceback" not in shown
    return shown


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ((), "--model and --out not given"),
        (("--model", MODEL), "--out not given"),
        (("--model", MODEL, "--out", "OUT", "--actors", "3:1"), "expected N or MIN:MAX"),
        (("--model", MODEL, "--out", "OUT", "--shard", "4/4"), "expected I/N with 0 <= I < N"),
        (("--model", MODEL, "--out", "OUT", "--dtype", "int3"), "dtype: "),
        (("--model", MODEL, "--out", "OUT", "--features", "cls,clz"), "clz"),
        (("--model", MODEL, "--out", "OUT", "--features", "none"), "neither features nor labels"),
        (("--model", MODEL, "--out", "OUT", "--storage-options", "{secret"), "not JSON (position 1"),
        (("--model", MODEL, "--out", "OUT", "--backend", "triton"), "needs --triton-url"),
        (("--model", MODEL, "--out", "OUT", "--features", "visual_tokens"), "no head that predicts visual tokens"),
        (("--model", MODEL, "--out", "OUT", "--features", "patches", "--backend", "null"), "leave out patches"),
        (("--model", MODEL, "--out", "OUT", "--image-size", "big"), "expected pixels as N or HEIGHTxWIDTH"),
        (("--model", MODEL, "--out", "OUT", "--image-size", "64x65"), "does not divide into patches"),
        (("--limit", "some"), "--limit"),
        (("--model", MODEL, "--out", "OUT", "--batch-size", "²"), "batch_size"),
        (("--no-such-option",), "--no-such-option"),
        (("--model", "/no/such/model", "--out", "OUT"), "/no/such/model"),
        (("--model", "nobody/nothing", "--out", "OUT"), "nobody/nothing"),
    ],
)
def test_options(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, extra: tuple[object, ...], message: str
) -> None:
    arguments = [tmp_path / "out" if argument == "OUT" else argument for argument in extra]
    shown = refused(capsys, "embed", folder, *arguments)
    assert message in shown
    assert "secret" not in shown
    assert not (tmp_path / "out" / "images").exists()


def test_an_unknown_key_names_the_nearest(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text('modle = "x"\n[fetch]\nconcurency = 3\n')
    shown = refused(capsys, "embed", folder, "--model", MODEL, "--out", tmp_path / "o", "--config", config)
    assert "unknown key `modle` in the spec; did you mean `model`?" in shown
    assert "unknown key `fetch.concurency` in the spec; did you mean `concurrency`?" in shown
    config.write_text('modle = "x"\n')
    shown = refused(capsys, "embed", folder, "--out", tmp_path / "o", "--config", config)
    assert "unknown key `modle` in the spec; did you mean `model`?" in shown


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (None, (), "cannot be read (Is a directory); give a TOML file"),
        (b"model = '\xff\xfe'", (), "is not TOML, which is text in UTF-8"),
        (b"model = ", (), "is not TOML: "),
        (b"fetch = 4", ("--timeout", "3"), "fetch: "),
        (b'triton = "hush"', ("--triton-model", "m"), "triton: "),
        (b'storage_options = "hush"', ("--zero-shot", "labels.txt"), "storage_options: expected a table"),
        (b"storage_options = 4", (), "storage_options: expected a table"),
    ],
)
def test_config_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes | None, more: tuple[str, ...], message: str
) -> None:
    config = tmp_path / "job.toml"
    config.mkdir() if content is None else config.write_bytes(content)
    shown = refused(capsys, "embed", "x", "--model", MODEL, "--out", tmp_path / "o", "--config", config, *more)
    assert message in shown
    assert "hush" not in shown


def test_a_config_file_takes_what_the_options_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("a cat\n\na dog\n")
    config = Path("job.toml")
    config.write_text(f'sources = "in"\ninclude = "*.jpg"\nmodel = "{MODEL}"\nout = "o"\nzero_shot = "words.txt"\n')
    asked: list[Any] = []
    monkeypatch.setattr("jobs.run.run_job", lambda values, **_: asked.append(build_spec(values)) or 0)
    assert run_command(["classify", "--config", "job.toml", "--features", "none"]) == 0
    (spec,) = asked
    assert (spec.sources, spec.include, spec.zero_shot) == (("in",), ("*.jpg",), ("a cat", "a dog"))
    assert (spec.features, spec.labels) == ((), 5)


@pytest.mark.parametrize(("given", "labels"), [("", 5), ("labels = 2\n", 2), ("labels = 0\n", 0)])
def test_the_task_of_a_config_file_goes_before_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, labels: int
) -> None:
    config = tmp_path / "job.toml"
    config.write_text(f'task = "classify"\nsources = "in"\nmodel = "{MODEL}"\nout = "o"\n{given}')
    asked: list[Any] = []
    monkeypatch.setattr("jobs.run.run_job", lambda values, **_: asked.append(build_spec(values)) or 0)
    assert run_command(["embed", "--config", str(config)]) == 0
    assert (asked[0].task, asked[0].labels) == ("classify", labels)


def test_a_demo_where_none_can_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said = refused(capsys, "demo", "--out", tmp_path / "file")
    assert f"cannot write {tmp_path}/file: a file stands" in said
    assert "committed" not in said  # nothing was
    for count in (0, -4, 24):  # fewer than there are kinds to tell apart
        assert "--pictures" in refused(capsys, "demo", "--out", tmp_path / "new", "--pictures", count)
    assert len(draw.CLASSES) == 25
    assert not (tmp_path / "new").exists()


def test_nothing_matches(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    rest = ("--model", MODEL, "--out", tmp_path / "o")
    assert "no image matches" in refused(capsys, "embed", f"{folder}/*.tiff", *rest)
    assert "no such file, folder or prefix" in refused(capsys, "embed", folder / "missing", *rest)
    assert "with the given --include/--exclude" in refused(capsys, "embed", folder, "--include", "*.xyz", *rest)
    (tmp_path / "t.csv").write_text("address\na.jpg\n")
    assert "has no column `uri`; it has address" in refused(capsys, "embed", tmp_path / "t.csv", *rest)


def test_an_output_of_something_else(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "o" / "images").mkdir(parents=True)
    (tmp_path / "o" / "images" / "theirs.parquet").write_bytes(b"x")
    shown = refused(capsys, "embed", folder, "--model", MODEL, "--out", tmp_path / "o")
    assert "already holds files (theirs.parquet" in shown
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "run.json").write_text(json.dumps({"hello": 1}))
    assert "not a run record" in refused(capsys, "embed", folder, "--model", MODEL, "--out", tmp_path / "p")
    for command in ("status", "verify", "compact", "retry"):
        assert "is not the directory of a run" in refused(capsys, command, tmp_path)
    for size in (0, -5):
        assert "--target-mib" in refused(capsys, "compact", tmp_path, "--target-mib", size)


def test_labels_of_a_model_without_any(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    from support.checkpoints import make_checkpoint

    plain = make_checkpoint(tmp_path / "vit", "vit")
    shown = refused(capsys, "classify", folder, "--model", plain, "--out", tmp_path / "o")
    assert "has no classifier" in shown
    assert "Embed without --labels" in shown


@pytest.mark.slow
def test_gpus_that_nobody_has(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs", "embed", folder, "--model", MODEL, "--out", tmp_path / "o"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*map(str, command), "--gpus-per-actor", "1"], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "needs 1 GPUs, the cluster has 0 GPUs" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_cluster_that_does_not_answer(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs", "embed", folder, "--model", MODEL, "--out", tmp_path / "o"]
    done = subprocess.run(
        [*map(str, command), "--address", "127.0.0.1:1"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "no Ray cluster answers at 127.0.0.1:1" in done.stderr


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    code = "import sys; from jobs.__main__ import main; main(['--help']); "
    code += "print(sorted({'torch', 'ray', 'pandas', 'pyarrow', 'numpy', 'fsspec'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "embed" in done.stdout


def test_a_wrong_path_does_not_wait_for_what_a_job_needs_later() -> None:
    later = {"torch", "ray.data", "pandas", "aiohttp", "duckdb", "ray.autoscaler.sdk"}
    code = f"import sys, jobs.run, pipeline.flow, cluster.session; print(sorted({later!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_another_projects_packages_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "finds the package `pipeline` at" in done.stderr


def test_a_file_that_goes_while_a_command_reads_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def overtaken(*arguments: object, **options: object) -> None:
        (tmp_path / "images" / "part-0.parquet").read_bytes()

    monkeypatch.setattr("jobs.cli.app", overtaken)
    shown = refused(capsys, "sql", tmp_path)
    assert "part-0.parquet" in shown
    assert "another command may have replaced it meanwhile" in shown


def test_what_nobody_foresaw_is_shown_without_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no route to s3://user:hunter2@b/a.jpg?X-Amz-Signature=hunter3")

    monkeypatch.setattr("jobs.cli.app", broken)
    assert run_command(["embed"]) == 1
    shown = capsys.readouterr().err
    assert "RuntimeError: no route to s3://b/a.jpg" in shown
    assert "Traceback" in shown
    assert "hunter" not in shown


@pytest.mark.parametrize("step", ["resolve_job", "open_directory"])
def test_ctrl_c_before_the_first_row_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: str
) -> None:
    monkeypatch.setattr(f"pipeline.flow.{step}", raiser(KeyboardInterrupt()))
    assert run_command(["embed", "in", "--backend", "null", "--out", str(tmp_path / "o")]) == 130
    assert f"interrupted; what was committed stays in {tmp_path}/o, the same command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (EOFError("Ran out of input"), 1, "EOFError: Ran out of input\n"),
        (BrokenPipeError(32, "Broken pipe"), 2, "error: BrokenPipeError: [Errno 32] Broken pipe. "),
    ],
)
def test_what_ends_a_command_is_told(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr("pipeline.maintenance.status", raiser(error))
    assert run_command(["status", "out"]) == code
    assert message in capsys.readouterr().err


def test_every_command_can_show_where_it_happened(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.maintenance.status", raiser(OSError("no room")))
    assert "PATCHSTREAM_VERBOSE=1 in the environment shows where it happened" in refused(capsys, "status", "out")
    monkeypatch.setenv("PATCHSTREAM_VERBOSE", "1")
    assert run_command(["status", "out"]) == 2
    assert "Traceback" in capsys.readouterr().err


def raiser(error: BaseException) -> Callable[..., Any]:
    def function(*arguments: object, **options: object) -> Any:
        raise error

    return function


def test_a_variable_that_a_submitted_command_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Also where no node is asked for it, and before a store is."""
    monkeypatch.setenv("PATCHSTREAM_NEEDS_ENV", "PATH NOBODY_HAS_THIS")
    shown = refused(capsys, "search", tmp_path / "none", "--row", 1)
    assert "error: NOBODY_HAS_THIS not set in the environment of" in shown
    assert "PATH" not in shown
