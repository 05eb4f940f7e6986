"""`classify --zero-shot` and `search --text` as a person runs them, with a random LiT pair."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import lit
from support.commands import patchstream, table
from support.testdata import needs_testdata, photos

from jobs.cli import run_command
from pipeline.opening import _model_record as model_record
from pipeline.opening import resolve_job
from pipeline.record import check_same, new_record, recorded_spec
from schemas.errors import OutputError, SpecError
from schemas.run import difference
from schemas.spec import JobSpec, build_spec

LABELS = ("dog", "cat", "red house")
TEMPLATES = ("a photo of a {}.", "the {}!")
IDS = {word: number for number, word in enumerate(lit.WORDS)}


def ids(text: str) -> list[int]:
    words = text.replace(".", " .").replace("!", " !").split()
    return ([IDS["[CLS]"], *(IDS[word] for word in words)] + [0] * lit.LENGTH)[: lit.LENGTH]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lit")
    np.savez(folder / "LiT-X.npz", **lit.random_pair("bert"))
    lit.write_words(folder / "LiT-X.txt")
    return folder / "LiT-X.npz"


def values(model: Path, **more: object) -> dict[str, object]:
    return {"sources": ["photos"], "model": str(model), "out": "out", "task": "classify", "labels": 2, **more}


@pytest.mark.slow
@needs_testdata
def test_labels_in_the_users_words_then_search_by_text(tmp_path: Path, model: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in photos(12):
        # At the model's size already, so that no resize stands between the pixels and NumPy.
        Image.open(path).convert("RGB").resize((lit.SIZE, lit.SIZE)).save(pictures / f"{path.stem}.png")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n\n")
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    out = tmp_path / "out"
    command = ["classify", pictures, "--model", model, "--out", out, "--top-k", "3", "--features", "pooled"]
    words = ["--zero-shot", tmp_path / "labels.txt", "--templates", tmp_path / "templates.txt"]
    done = patchstream(*command, *words, "--dtype", "float32", "--json")
    assert done.returncode == 0, done.stderr

    with np.load(model) as file:
        arrays = dict(file)
    classes = lit.unit(sum(lit.texts(arrays, [ids(t.replace("{}", label)) for label in LABELS]) for t in TEMPLATES))
    written = table(out)
    pixels = np.stack([np.asarray(Image.open(uri)) for uri in written["uri"].to_pylist()])
    expected = lit.probabilities(arrays, pixels, classes)
    for labels, row in zip(written["labels"].to_pylist(), expected, strict=True):
        assert [label["index"] for label in labels] == list(np.argsort(-row))
        assert [label["label"] for label in labels] == [LABELS[i] for i in np.argsort(-row)]
        np.testing.assert_allclose([label["score"] for label in labels], np.sort(row)[::-1], atol=1e-5)
    record = json.loads((out / "run.json").read_text())
    assert len(record["model"]["zero_shot"]) == 64
    assert record["spec"]["zero_shot"] == list(LABELS)

    (tmp_path / "labels.txt").write_text("\n".join(LABELS[::-1]))
    other = patchstream(*command, *words, "--dtype", "float32", "--json")
    assert other.returncode == 2
    assert "model.zero_shot: there" in other.stderr
    assert 'spec.zero_shot: there ["dog"' in other.stderr

    found = patchstream("search", out, "--text", "a red house", "--features", "pooled", "--json")
    assert found.returncode == 0, found.stderr
    cosines = lit.images(arrays, pixels) @ lit.texts(arrays, [ids("a red house")])[0]
    hits = json.loads(found.stdout)
    assert [hit["row"] for hit in hits] == list(np.argsort(-cosines)[: len(hits)])
    np.testing.assert_allclose([hit["score"] for hit in hits], np.sort(cosines)[::-1][: len(hits)], atol=1e-4)
    again = patchstream("search", out, "--text", "a red house", "--json")
    assert (again.returncode, again.stdout) == (0, found.stdout)  # the run holds `pooled` alone


def test_answer_to_what_is_asked(model: Path) -> None:
    resolved = resolve_job(build_spec(values(model, zero_shot=list(LABELS))))
    assert resolved.wanted.label_names == LABELS
    assert resolved.wanted.labels == 2
    assert resolved.info is not None
    assert resolved.info.zero_shot is not None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"zero_shot": ["dog"], "labels": 0}, "add --labels K"),
        ({"zero_shot": ["dog"], "backend": "null"}, "need --backend torch"),
        ({"templates": ["a {}"]}, "give those with --zero-shot"),
        ({}, "say the labels with --zero-shot"),
        ({"zero_shot": ["dog", "dog"]}, "'dog' stands there twice"),
    ],
)
def test_refusals(model: Path, more: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        resolve_job(build_spec(values(model, **more)))


def test_what_is_recorded_runs_the_same_again(model: Path, tmp_path: Path) -> None:
    """`retry` has run.json alone to go by. A vocabulary may have moved, if it is the same."""
    moved = tmp_path / "words.txt"
    moved.write_bytes(model.with_suffix(".txt").read_bytes())
    spec = build_spec(values(model, zero_shot=list(LABELS), templates=["the {}!"], vocabulary=str(moved)))
    again = build_spec({**recorded_spec(spec), "model": str(model), "out": "out"})
    assert (again.zero_shot, again.templates, again.vocabulary) == (LABELS, ("the {}!",), str(moved))
    records = []
    for one in (spec, again.model_copy(update={"vocabulary": None}), again.model_copy(update={"templates": None})):
        resolved = resolve_job(one)
        records.append(new_record(one, model_record(resolved), {}))
    check_same(records[0], records[1], "out")
    with pytest.raises(OutputError, match=r"model\.zero_shot: there .* now "):
        check_same(records[0], records[2], "out")


def test_files_of_a_run_are_recorded_whole_and_without_passwords(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    places = {"head": "https://me:secret@host/head", "vocabulary": "words.txt", "label_file": "names.txt"}
    recorded = recorded_spec(build_spec(values(model, zero_shot=list(LABELS))).model_copy(update=places))
    assert recorded["head"] == "https://host/head"
    assert recorded["vocabulary"] == str(model.parent / "words.txt")
    assert recorded["label_file"] == str(model.parent / "names.txt")


def test_label_file_that_cannot_be_read(tmp_path: Path, model: Path) -> None:
    from jobs.embed import read_lines

    with pytest.raises(SpecError, match=r"--zero-shot .*gone.txt: cannot be read.*no such file"):
        read_lines(str(tmp_path / "gone.txt"), "--zero-shot", {})
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(SpecError, match="as text in UTF-8"):
        read_lines(str(tmp_path / "bytes"), "--zero-shot", {})
    nobody = {
        "s3": {
            "key": "k",
            "secret": "s",
            "endpoint_url": "http://127.0.0.1:9",
            "config_kwargs": {"retries": {"max_attempts": 0}},
        }
    }
    with pytest.raises(SpecError, match=r"s3://bucket/words.txt: cannot be read .*Could not connect"):
        read_lines("s3://bucket/words.txt", "--zero-shot", nobody)


def test_labels_and_templates_from_pipes(pipe: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `<(…)` in a shell gives them."""
    asked: list[JobSpec] = []
    monkeypatch.setattr("jobs.run.run_job", lambda values, **_: asked.append(build_spec(values)) or 0)
    words, sentences = pipe(b"a cat\n\na dog\n"), pipe(b"a photo of {}\n")
    config = pipe(f'sources = "in"\nmodel = "m"\nout = "o"\ntemplates = "{sentences}"\n'.encode())
    assert run_command(["classify", "--config", config, "--zero-shot", words]) == 0
    assert [(spec.zero_shot, spec.templates) for spec in asked] == [(("a cat", "a dog"), ("a photo of {}",))]


def test_long_lists_are_cut_where_two_runs_differ() -> None:
    (line,) = difference({"zero_shot": [f"label {i}" for i in range(1000)]}, {"zero_shot": ["dog"]})
    assert len(line) < 400
    assert line.endswith('now ["dog"]')
