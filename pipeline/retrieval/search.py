"""Search: the pictures most like some examples and least like others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict
from zipfile import BadZipFile

import numpy as np
import pyarrow.dataset as pads

from pipeline.retrieval.addresses import different_pictures, named_rows, newest
from pipeline.retrieval.arrays import Floats, Ints, Preparation, unit
from pipeline.retrieval.nearest import top_k
from pipeline.retrieval.store import FeatureStore
from pipeline.storage import redact
from schemas.errors import SpecError

# Paths or URLs of pictures, or texts, to their vectors (n, D) float32, by the model of the run.
Embed = Callable[[list[str]], Floats]
# Prepared queries (Q, D) and k to scores and positions in the matrix (Q, k), as an index finds them.
Finder = Callable[[Floats, int], tuple[Floats, Ints]]


class Hit(TypedDict):
    """One result. `score` is the cosine to the query, at most 1."""

    row: int
    uri: str
    score: float


@dataclass(frozen=True)
class Example:
    """One `--image`, `--row`, `--uri`, `--vector` or `--text`, or one `--minus…`."""

    kind: Literal["image", "row", "uri", "vector", "text"]
    value: str
    minus: bool = False

    @property
    def option(self) -> str:
        """How it was, or could have been, given on the command line."""
        return f"--minus {self.kind}={self.value}" if self.minus else f"--{self.kind} {self.value}"


@dataclass(frozen=True)
class Query:
    """What is searched for: `vector` (D,) of length 1, and the rows that were given as examples."""

    vector: Floats
    rows: Ints


def build_query(
    store: FeatureStore,
    feature: str,
    examples: Sequence[Example],
    embed: Embed | None,
    prepare: Preparation,
    embed_texts: Embed | None = None,
) -> Query:
    """The mean direction of the examples less that of the `minus` ones.

    Raises SpecError for an example that is not there, has another dimension or no direction, or if all cancel out.
    """
    check_examples(store, feature, examples)
    images = [example.value for example in examples if example.kind == "image"]
    if images and embed is None:
        raise SpecError("--image needs the model of the run, which is not at hand here; search by --row or --vector")
    texts = [example.value for example in examples if example.kind == "text"]
    if texts and embed_texts is None:
        raise SpecError("--text needs the text tower of the run's model, which is not at hand here")
    embedded = {
        "image": iter(embed(images)) if images and embed is not None else iter(()),
        "text": iter(embed_texts(texts)) if texts and embed_texts is not None else iter(()),
    }
    sums = {False: np.zeros(store.check_feature(feature)), True: np.zeros(store.check_feature(feature))}
    counts = {False: 0, True: 0}
    rows: list[int] = []
    for example in examples:
        found = next(embedded.get(example.kind, iter(())), None)
        vector = _vector(store, feature, example, rows) if found is None else found
        sums[example.minus] += _direction(vector, prepare, example)
        counts[example.minus] += 1
    wanted = sums[False] / counts[False] - sums[True] / max(1, counts[True])
    if np.linalg.norm(wanted) < 1e-6:
        raise SpecError("the examples cancel each other out: what is wanted is what is not wanted")
    return Query(unit(wanted[None].astype(np.float32)).reshape(-1), np.array(sorted(set(rows)), np.int64))


def check_exact(where: str | None, index: object) -> None:
    """Raise SpecError for a condition together with an index, be it the name of one or what finds by it."""
    if where is not None and index is not None:
        raise SpecError("--filter and --index do not go together: an index cannot tell which rows match; leave one out")


def check_examples(store: FeatureStore, feature: str, examples: Sequence[Example]) -> None:
    """Raise SpecError for what is wrong with the examples without a look at the vectors of the run."""
    if not any(not example.minus for example in examples):
        raise SpecError("nothing to search for: give --image, --row, --uri, --vector or --text at least once")
    for example in examples:
        if example.kind == "row":
            _row_id(example)
        elif example.kind == "vector":
            _read_vector(example, store, feature)


def _vector(store: FeatureStore, feature: str, example: Example, rows: list[int]) -> Floats:
    if example.kind == "vector":
        return _read_vector(example, store, feature)
    row = _row_id(example) if example.kind == "row" else _row_of_uri(store, example)
    position = int(store.load(feature).positions_of(np.array([row]))[0])
    if position < 0:
        raise SpecError(
            f"{example.option}: no such row in images/ (it has {len(store)} rows between "
            f"{store.load(feature).rows.min()} and {store.load(feature).rows.max()}; a failed image has no vector)"
        )
    rows.append(row)
    return store.load(feature).take(np.array([position])).reshape(-1)


def _row_id(example: Example) -> int:
    try:
        return int(example.value)
    except ValueError:
        raise SpecError(f"{example.option}: not a number") from None


def _row_of_uri(store: FeatureStore, example: Example) -> int:
    wanted = pads.field("uri") == redact(example.value)  # as it is stored
    found = store.reread(lambda: store.dataset().to_table(columns=["row"], filter=wanted)).column("row").to_numpy()
    if not len(found):
        sample = store.dataset().head(1, columns=["uri"]).column("uri")[0].as_py()
        raise SpecError(f"{redact(example.option)}: no image of this address in images/; addresses look like {sample}")
    live = found[newest(store, found)]
    if unlike := different_pictures(store, [live.tolist()]):
        raise SpecError(
            f"{redact(example.option)}: the address of {named_rows(unlike)}, which hold different pictures; name one "
            "of them by its row"
        )
    # Where no newer version has come about yet, the older one still says what is looked for.
    return int((live if len(live) else found).max())


def _read_vector(example: Example, store: FeatureStore, feature: str) -> Floats:
    path = example.value
    dim = store.check_feature(feature)
    if not Path(path).is_file():
        raise SpecError(f"{example.option}: no such file")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError, BadZipFile) as error:
        raise SpecError(f"{example.option}: not a .npy array ({error})") from None
    if not isinstance(array, np.ndarray):
        raise SpecError(f"{example.option}: an archive of several arrays; save one with numpy.save")
    if array.ndim not in (1, 2) or array.size != dim or array.dtype.kind not in "fiu":
        raise SpecError(
            f"{example.option}: an array of shape {array.shape} and type {array.dtype}, but `{feature}` of this run "
            f"has {dim} numbers; vectors of another model cannot be compared with these"
        )
    vector: Floats = array.reshape(dim).astype(np.float32)
    return vector


def _direction(vector: Floats, prepare: Preparation, example: Example) -> Floats:
    direction: Floats = unit(prepare.apply(np.asarray(vector, np.float32)[None])).reshape(-1)
    if not (np.isfinite(direction).all() and np.any(direction)):
        raise SpecError(f"{example.option}: its vector is zero or not finite, so nothing is like it")
    return direction


def search(
    store: FeatureStore,
    query: Query,
    k: int,
    *,
    feature: str = "cls",
    where: str | None = None,
    prepare: Preparation | None = None,
    finder: Finder | None = None,
    keep_examples: bool = False,
    device: str = "cpu",
) -> list[Hit]:
    """The `k` rows nearest to `query`, best first, by cosine; rows given as examples are left out unless kept.

    Exact unless `finder` (an index) is given, which may find fewer than k in the lists that it looks through. `where`
    is an SQL condition on `images`; with it there may be fewer too. Raises SpecError if k exceeds the number of rows.
    """
    matrix = store.load(feature)
    usable = int(matrix.usable.sum())
    if not 1 <= k <= usable:
        raise SpecError(f"-k {k}: {usable} rows have a usable `{feature}`; ask for between 1 and {usable}")
    check_exact(where, finder)
    excluded = np.empty(0, np.int64) if keep_examples else query.rows
    wanted = k + len(excluded)
    if finder is not None:
        scores, positions = finder(query.vector[None], wanted)
    else:
        chosen = None if where is None else np.sort(matrix.positions_of(store.rows(where)))
        # Parts that were compacted meanwhile may hold newer rows, which are not in the matrix.
        chosen = chosen if chosen is None else chosen[chosen >= 0]
        scores, positions = top_k(matrix, query.vector[None], wanted, positions=chosen, prepare=prepare, device=device)
    there = positions[0] >= 0
    found, scores = matrix.rows[positions[0][there]], scores[:, there]
    keep = np.flatnonzero(~np.isin(found, excluded))[:k]
    uris = store.uris(found[keep])
    return [
        Hit(row=int(found[at]), uri=uri, score=float(np.clip(scores[0, at], -1, 1)))
        for at, uri in zip(keep, uris, strict=True)
    ]
