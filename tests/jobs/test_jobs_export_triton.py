"""`patchstream export-triton`: what it writes, what it says, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.export_triton import COMMANDS
from schemas.errors import CheckpointError, SpecError

app = typer.Typer()
app.command("export-triton")(COMMANDS["export-triton"])
app.command("other")(lambda: None)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["export-triton", *arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("model") / "vit", "vit-classifier", image_size=32, patch_size=8)


def test_writes_both_models_and_says_what_comes_next(checkpoint: Path, tmp_path: Path) -> None:
    result = run(str(checkpoint), "--out", str(tmp_path / "repository"), "--max-batch", "16")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [f"{tmp_path}/repository/vit-32x32", f"{tmp_path}/repository/vit-32x32-onnx"]
    assert "--backend triton --triton-url grpc://HOST:8001 --out" in result.stderr
    assert "max_batch_size: 16" in (tmp_path / "repository/vit-32x32/config.pbtxt").read_text()
    assert (tmp_path / "repository/vit-32x32-onnx/1/model.onnx").stat().st_size > 10_000


def test_the_next_command_asks_for_what_was_exported(tmp_path: Path) -> None:
    from support.checkpoints import make_checkpoint

    model = make_checkpoint(tmp_path / "beit", "beit-mim", image_size=32, patch_size=8)
    options = ("--image-size", "48x32", "--revision", "v1", "--beit-final-norm", "--name", "night")
    result = run(str(model), "--out", str(tmp_path / "repository"), "--no-onnx", *options)
    assert result.exit_code == 0, result.output
    for option in ("--image-size 48x32", "--revision v1", "--beit-final-norm", "--triton-model night"):
        assert option in result.stderr


def test_json_and_a_name_of_ones_own(checkpoint: Path, tmp_path: Path) -> None:
    options = ("--name", "night", "--no-onnx", "--dtype", "bfloat16", "--json")
    result = run(str(checkpoint), "--out", str(tmp_path), *options)
    found = json.loads(result.stdout)
    assert found["models"] == ["night"]
    assert len(found["digest"]) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["night"]
    assert 'key: "dtype", value { string_value: "bfloat16" }' in (tmp_path / "night/config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "int3"), "--dtype int3"),
        (("--dtype", "float16"), "add --gpu"),
        (("--name", "a/b"), "--name a/b"),
    ],
)
def test_refuses(checkpoint: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = run(str(checkpoint), "--out", str(tmp_path), "--no-onnx", *options)
    assert isinstance(result.exception, SpecError)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = run(str(tmp_path / "nothing"), "--out", str(tmp_path / "repository"))
    assert isinstance(result.exception, CheckpointError)


def test_importing_the_command_imports_nothing_heavy() -> None:
    program = "import sys, jobs.export_triton; print({'torch', 'ray', 'numpy', 'grpc'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
