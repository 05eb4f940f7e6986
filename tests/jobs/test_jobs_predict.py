"""`predict`: one JSON request on standard input, labels or reasons out, in the order asked."""

import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint, make_timm_checkpoint, preprocessed, reference_outputs
from support.http_server import HttpServer

from jobs.cli import run_command
from jobs.demo import draw
from pipeline.models import inspect_model, with_head
from pipeline.online import Settings, answer, is_address, parse_request
from pipeline.opening import resolve_job
from schemas.errors import SpecError
from schemas.spec import JobSpec

DEMO = Path(draw.__file__).parent / "model"

Predict = Callable[..., tuple[int, str, str]]


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Predict:
    """Exit code, standard output and standard error of a request."""

    def run(request: Any, *arguments: str, model: Path = DEMO) -> tuple[int, str, str]:
        data = request if isinstance(request, bytes) else json.dumps(request).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        capsys.readouterr()
        code = run_command(["predict", "--model", str(model), *arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("predict")
    draw.write_pictures(folder, 3, seed=5)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def coded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_base64_and_urls_in_the_order_asked(
    predict: Predict, pictures: list[Path], http_server: Callable[..., HttpServer]
) -> None:
    server = http_server(pictures[0].parent)
    url = f"{server.url}/{pictures[1].name}"
    wrapped = "\n".join(coded(pictures[2])[i : i + 76] for i in range(0, len(coded(pictures[2])), 76))
    code, out, _ = predict(
        {"input_data": [coded(pictures[0]), url, wrapped, f"data:image/png;base64,{coded(pictures[0])}"]}
    )
    assert code == 0
    answers = json.loads(out)
    assert [len(labels) for labels in answers] == [5, 5, 5, 5]
    for labels in answers:
        scores = [label["score"] for label in labels]
        assert scores == sorted(scores, reverse=True)
        assert all(set(label) == {"label", "score"} for label in labels)
    # The toy model knows its pictures: a file is named after what is drawn in it.
    best = [labels[0]["label"] for labels in answers]
    assert best == [pictures[i].stem.rsplit("_", 1)[0].replace("-", " ") for i in (0, 1, 2, 0)]
    assert answers[0] == answers[3]


def test_scores_are_those_of_the_reference(tmp_path: Path, pictures: list[Path]) -> None:
    for problem, score in ((None, torch.softmax), ("multi_label_classification", lambda x, dim: torch.sigmoid(x))):
        folder = make_checkpoint(tmp_path / str(problem), "vit-classifier", problem_type=problem)
        _, values = preprocessed(folder, pictures)
        logits = reference_outputs(folder, values).logits
        assert logits is not None
        expected = score(logits, dim=-1).sort(dim=-1, descending=True)
        answers = answer(inspect_model(str(folder)), [coded(path) for path in pictures], Settings(top_k=37))
        got = np.array([[label["score"] for label in labels] for labels in answers])
        np.testing.assert_allclose(got, expected.values.numpy(), atol=1e-5)
        assert [labels[0]["label"] for labels in answers] == [f"LABEL_{int(i)}" for i in expected.indices[:, 0]]
        assert (abs(got.sum(axis=1) - 1) < 1e-4).all() == (problem is None)


def test_a_single_label_is_scored_by_a_sigmoid(tmp_path: Path, pictures: list[Path]) -> None:
    """As transformers' pipeline does it; a softmax would be 1 for every picture."""
    folder = make_checkpoint(tmp_path / "vit", "vit-classifier", num_labels=1)
    _, values = preprocessed(folder, pictures)
    logits = reference_outputs(folder, values).logits
    assert logits is not None
    answers = answer(inspect_model(str(folder)), [coded(path) for path in pictures], Settings())
    got = np.array([[label["score"] for label in labels] for labels in answers])
    np.testing.assert_allclose(got, torch.sigmoid(logits).numpy(), atol=1e-5)
    make_timm_checkpoint(tmp_path / "timm", "vit_tiny_patch16_224", depth=1, num_classes=1)
    assert inspect_model(str(tmp_path / "timm")).multi_label


@pytest.mark.parametrize("count", [1, 3])
def test_quantities_are_no_scores(count: int, tmp_path: Path, predict: Predict, pictures: list[Path]) -> None:
    folder = make_checkpoint(tmp_path / "vit", "vit-classifier", num_labels=count, problem_type="regression")
    code, _, shown = predict({"input_data": [coded(pictures[0])]}, model=folder)
    assert code == 2
    assert "trained for regression" in shown
    spec = JobSpec(sources=(str(pictures[0]),), out=str(tmp_path / "out"), model=str(folder))
    assert resolve_job(spec).wanted.labels == 0
    with pytest.raises(SpecError, match="trained for regression"):
        resolve_job(spec.model_copy(update={"labels": 1}))
    # A classifier of one's own in its place has scores all the same.
    own = with_head(inspect_model(str(folder)), ("a", "b"), np.zeros((2, 96), np.float32), np.zeros(2), "cls", "")
    assert not own.regression


def test_one_bad_image_does_not_lose_the_others(
    predict: Predict, pictures: list[Path], http_server: Callable[..., HttpServer]
) -> None:
    server = http_server(pictures[0].parent)
    broken = base64.b64encode(pictures[0].read_bytes()[:200]).decode()
    items = [f"{server.url}/none.jpg", coded(pictures[0]), broken, "no picture!", "", coded(pictures[1])]
    code, out, shown = predict({"input_data": items}, "--top-k", "1")
    assert code == 0
    answers = json.loads(out)
    assert [type(item) for item in answers] == [dict, list, dict, dict, dict, list]
    assert [item["stage"] for item in answers if isinstance(item, dict)] == ["fetch", "decode", "fetch", "fetch"]
    assert [answers[i]["error"] for i in (0, 3, 4)] == ["NotFound", "NotBase64", "NoBytes"]
    assert all(item["message"] for item in answers if isinstance(item, dict))
    code, out, _ = predict({"input_data": [f"{server.url}/\ud800.jpg", coded(pictures[0])]}, "--top-k", "1")
    assert [type(item) for item in json.loads(out)] == [dict, list], "half a surrogate pair is no text"
    assert "4 of 6 images failed" in shown
    assert predict({"input_data": ["%%%"]})[0] == 3
    assert predict({"input_data": []})[:2] == (0, "[]\n")


def test_base64_without_padding_and_with_space_around_it(predict: Predict, pictures: list[Path]) -> None:
    """Bytes behind the end of a picture give each of the paddings."""
    for behind in (b"", b"-", b"--"):
        bare = base64.urlsafe_b64encode(pictures[0].read_bytes() + behind).decode().rstrip("=")
        items = [bare, f" \n{bare}\n", f"\n data:image/png;base64,{bare}"]
        code, out, shown = predict({"input_data": items}, "--top-k", "1")
        assert code == 0, shown
        assert [type(item) for item in json.loads(out)] == [list] * 3
    assert json.loads(predict({"input_data": ["YWJjZ", "YWJjZ==="]})[1])[0]["error"] == "NotBase64"


def test_a_signed_address_keeps_its_secret(predict: Predict) -> None:
    address = "http://user:hunter2@127.0.0.1:9/a.jpg?X-Amz-Signature=hunter3"
    _, out, shown = predict({"input_data": [address]}, "--timeout", "1")
    assert json.loads(out)[0]["stage"] == "fetch"
    assert "hunter" not in out + shown


@pytest.mark.parametrize(
    ("request_text", "message"),
    [
        ("", "not JSON"),
        ("[1", "not JSON"),
        ('["a"]', "standard input holds list; expected"),
        ('{"data": []}', "an object with data; expected"),
        ('{"input_data": "abc"}', "input_data is str, not a list"),
        ('{"input_data": ["YQ==", 7]}', "input_data[1] is int, not text"),
        ('{"input_data": [null]}', "input_data[0] is NoneType"),
    ],
)
def test_requests_that_are_none(predict: Predict, request_text: str, message: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_request(request_text)
    assert message in str(refused.value)
    code, out, shown = predict(request_text.encode())
    assert (code, out) == (2, "")
    assert message in shown


def test_wrong_use(predict: Predict, pictures: list[Path], tmp_path: Path) -> None:
    request = {"input_data": [coded(pictures[0])]}
    for dtype in ("int3", "int8", "float16"):
        code, _, shown = predict(request, "--dtype", dtype)
        assert (code, shown) == (2, f"error: --dtype {dtype}: choose one of auto, float32, bfloat16\n")
    assert predict(request, "--top-k", "0")[0] == 2
    assert predict(request, "--label-file", str(tmp_path / "none"))[0] == 2
    code, _, shown = predict(request, model=make_checkpoint(tmp_path / "vit", "vit"))
    assert code == 2
    assert "has no classifier" in shown


def test_names_from_a_file(predict: Predict, pictures: list[Path], tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"Größe {i}" for i in range(25)))
    code, out, _ = predict({"input_data": [coded(pictures[0])]}, "--label-file", str(names), "--top-k", "99")
    assert code == 0
    assert len(json.loads(out)[0]) == 25
    assert "Größe" in out


def test_addresses_and_base64_are_told_apart() -> None:
    assert is_address("https://h/a.jpg")
    assert is_address("s3://b/k")
    assert not is_address("aGVsbG8=")
    assert not is_address("data:image/png;base64,aGVsbG8=")
