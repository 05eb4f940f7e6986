"""Search: exact, by every kind of example, filtered, and its errors."""

import inspect
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.runs import RunContent, write_run

from jobs.retrieve import search as search_command
from pipeline.retrieval.arrays import Preparation, unit
from pipeline.retrieval.nearest import top_k
from pipeline.retrieval.page import Picture, pictures_page
from pipeline.retrieval.search import Example, Hit, build_query, search
from pipeline.retrieval.store import FeatureStore
from schemas.errors import SpecError
from schemas.redaction import redact

_RNG = np.random.default_rng(5)
VECTORS = (_RNG.standard_normal((3000, 32)) * np.linspace(0.1, 9, 3000)[:, None]).astype(np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = [[(row % 7, f"label {row % 7}", 0.5)] for row in range(3000)]
    vectors = VECTORS.astype(np.float32)
    return write_run(tmp_path_factory.mktemp("run"), RunContent({"cls": vectors}, labels=labels, parts=3))


@pytest.fixture(scope="module")
def store(run: Path) -> FeatureStore:
    return FeatureStore.open(str(run))


def expected_rows(query: np.ndarray, k: int, allowed: np.ndarray | None = None) -> list[int]:
    wide = VECTORS.astype(np.float32).astype(np.float64)
    scores = wide @ query / np.linalg.norm(wide, axis=1) / np.linalg.norm(query)
    rows = np.argsort(-scores, kind="stable")
    return [int(row) for row in rows if allowed is None or allowed[row]][:k]


def ask(store: FeatureStore, *examples: Example, k: int = 10, **options: object) -> list[Hit]:
    query = build_query(store, "cls", examples, None, Preparation())
    return search(store, query, k, **options)  # type: ignore[arg-type]


def test_by_vector_is_exact(store: FeatureStore, tmp_path: Path) -> None:
    query = np.random.default_rng(6).standard_normal(32)
    np.save(tmp_path / "q.npy", query)
    hits = ask(store, Example("vector", str(tmp_path / "q.npy")))
    assert [hit["row"] for hit in hits] == expected_rows(query, 10)
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert hits[0]["uri"] == f"memory://photo-{hits[0]['row']:07d}.jpg"


def test_by_row_and_uri_leave_the_example_out(store: FeatureStore) -> None:
    by_row = ask(store, Example("row", "1234"))
    assert [hit["row"] for hit in by_row] == expected_rows(VECTORS[1234], 11)[1:]
    assert ask(store, Example("uri", "memory://photo-0001234.jpg")) == by_row
    kept = ask(store, Example("row", "1234"), keep_examples=True)
    assert kept[0]["row"] == 1234
    assert kept[0]["score"] == pytest.approx(1, abs=1e-5)


def test_by_a_signed_address(tmp_path: Path) -> None:
    signed = [f"https://h/x{row}.jpg?X-Amz-Signature={row}" for row in range(4)]
    content = RunContent({"cls": np.eye(4, dtype=np.float32)}, uris=[redact(uri) for uri in signed])
    store = FeatureStore.open(str(write_run(tmp_path, content)))
    assert build_query(store, "cls", [Example("uri", signed[2])], None, Preparation()).rows.tolist() == [2]


def test_several_minus_others(store: FeatureStore) -> None:
    a, b, c = unit(VECTORS[[3, 4, 5]].astype(np.float32))
    hits = ask(store, Example("row", "3"), Example("row", "4"), Example("row", "5", minus=True))
    wanted = [row for row in expected_rows((a + b) / 2 - c, 13) if row not in (3, 4, 5)][:10]
    assert [hit["row"] for hit in hits] == wanted


def test_filter_restricts(store: FeatureStore) -> None:
    hits = ask(store, Example("row", "10"), where="labels[1].label = 'label 2'")
    allowed = np.arange(3000) % 7 == 2
    assert [hit["row"] for hit in hits] == expected_rows(VECTORS[10], 10, allowed)
    assert ask(store, Example("row", "10"), where="row = -1") == []


def test_image_goes_through_the_embedding(store: FeatureStore) -> None:
    def embed(images: list[str]) -> np.ndarray:
        assert images == ["a.jpg", "b.jpg"]
        return VECTORS[[70, 71]].astype(np.float32)

    examples = [Example("image", "a.jpg"), Example("image", "b.jpg", minus=True)]
    query = build_query(store, "cls", examples, embed, Preparation())
    np.testing.assert_allclose(query.vector, unit(unit(VECTORS[70:71]) - unit(VECTORS[71:72]))[0], atol=1e-5)
    assert search(store, query, 1)[0]["row"] == 70


def test_many_queries_and_chunks_agree_with_numpy(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.retrieval.matrix.CHUNK_BYTES", 4 * 32 * 100)
    for mean in (None, VECTORS.mean(axis=0).astype(np.float32)):
        prepare = Preparation(mean=mean)
        prepared = prepare.apply(VECTORS.astype(np.float32))
        scores, positions = top_k(store.load("cls"), prepared[:20], 5, prepare=prepare)
        expected = np.argsort(-(prepared[:20] @ prepared.T), axis=1)[:, :5]
        np.testing.assert_array_equal(positions, expected)
        np.testing.assert_allclose(scores[:, 0], 1, atol=1e-5)


def test_bad_vectors_are_never_found(tmp_path: Path) -> None:
    vectors = VECTORS[:50].astype(np.float32)
    vectors[7], vectors[9] = np.nan, 0
    store = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": vectors}))))
    hits = ask(store, Example("row", "1"), k=48)
    assert {hit["row"] for hit in hits} == set(range(50)) - {1, 7, 9}
    with pytest.raises(SpecError, match="zero or not finite"):
        ask(store, Example("row", "9"))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example("row", "3000"), "no such row in images/.*3000 rows between 0 and 2999"),
        (Example("row", "ten"), "--row ten: not a number"),
        (Example("uri", "s3://b/x.jpg"), "addresses look like memory://photo-0000000.jpg"),
        (Example("vector", "/nowhere.npy"), "no such file"),
        (Example("row", "3", minus=True), "nothing to search for"),
    ],
)
def test_examples_that_are_not_there(store: FeatureStore, example: Example, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ask(store, example)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example("row", "3000", minus=True), "^--minus row=3000: no such row"),
        (Example("uri", "x=3", minus=True), "^--minus uri=x=3: no image"),
        (Example("vector", "/nowhere.npy", minus=True), "^--minus vector=/nowhere.npy: no such file"),
    ],
)
def test_an_unwanted_example_is_named_by_its_option(store: FeatureStore, example: Example, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ask(store, Example("row", "3"), example)


def test_vector_of_another_model(store: FeatureStore, tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", np.ones(48, np.float32))
    with pytest.raises(SpecError, match=r"shape \(48,\).*`cls` of this run has 32"):
        ask(store, Example("vector", str(tmp_path / "q.npy")))
    np.savez(tmp_path / "q.npz", np.ones(48, np.float32))
    with pytest.raises(SpecError, match="an archive of several arrays"):
        ask(store, Example("vector", str(tmp_path / "q.npz")))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "q.npz").read_bytes()[:100])
    with pytest.raises(SpecError, match=r"not a \.npy array"):
        ask(store, Example("vector", str(tmp_path / "cut.npz")))
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(SpecError, match=r"not a \.npy array"):
        ask(store, Example("vector", str(tmp_path / "text.npy")))


def test_k_and_cancelling_examples(store: FeatureStore) -> None:
    with pytest.raises(SpecError, match="-k 3001: 3000 rows have a usable `cls`"):
        ask(store, Example("row", "1"), k=3001)
    with pytest.raises(SpecError, match="-k 0"):
        ask(store, Example("row", "1"), k=0)
    with pytest.raises(SpecError, match="cancel"):
        ask(store, Example("row", "1"), Example("row", "1", minus=True))


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_page_shows_hostile_text_as_text() -> None:
    hostile = """"><script>alert(1)</script><img src=x onerror='alert(2)'>"""
    page = pictures_page(hostile, [(hostile, [Picture(1, [hostile]), Picture(2, ["b"])])], {1: "data:image/x;base64,"})
    tags = _Tags()
    tags.feed(page)
    assert "script" not in tags.tags
    assert "onerror" not in tags.attributes
    assert page.count("&lt;script&gt;") == 5


@pytest.mark.parametrize(("rows", "queries", "k"), [(100_000, 1, 10), (99_999, 5, 3), (10_247, 2, 10), (300, 3, 300)])
def test_selection_in_two_steps_is_the_plain_one(tmp_path: Path, rows: int, queries: int, k: int) -> None:
    rng = np.random.default_rng(rows)
    vectors = rng.standard_normal((rows, 8)).astype(np.float32)
    asked = rng.standard_normal((queries, 8)).astype(np.float32)
    store = FeatureStore.open(str(write_run(tmp_path, RunContent({"cls": vectors}))))
    scores, positions = top_k(store.load("cls"), asked, k)
    all_scores = asked @ vectors.T / np.linalg.norm(vectors, axis=1)
    np.testing.assert_array_equal(positions, np.argsort(-all_scores, axis=1, kind="stable")[:, :k])
    np.testing.assert_allclose(scores, -np.sort(-all_scores, axis=1)[:, :k], rtol=1e-5)


def test_the_condition_in_the_help_finds_the_labels_of_imagenet(tmp_path: Path) -> None:
    option = inspect.signature(search_command).parameters["where"].annotation.__metadata__[0]
    (condition,) = re.findall('"(.+)"', option.help)
    labels = [[(0, "tench, Tinca tinca", 0.9)], [(1, "goldfish, Carassius auratus", 0.9)], [(0, "tench", 0.9)]]
    run = write_run(tmp_path, RunContent({"cls": np.ones((3, 4), np.float32)}, labels=labels))
    assert FeatureStore.open(str(run)).rows(condition).tolist() == [0, 2]
