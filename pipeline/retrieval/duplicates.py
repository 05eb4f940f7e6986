"""Duplicates: the same bytes or nearly the same vector, grouped, one of each group kept.

Pairs make connected components: a picture belongs to a group if it is near to any member, so its score, the cosine to
the kept picture, can lie below the threshold. Kept is the picture with the most pixels, of equals the lowest row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from pipeline.addresses import join
from pipeline.retrieval.addresses import named_elsewhere, places
from pipeline.retrieval.arrays import Floats, Ints, Mask, Preparation
from pipeline.retrieval.components import Components
from pipeline.retrieval.matrix import Matrix
from pipeline.retrieval.output import check_name, replacing, write_json, write_table
from pipeline.retrieval.pairs import near_pairs
from pipeline.retrieval.query import run_query
from pipeline.retrieval.store import FeatureStore
from pipeline.storage import put_bytes
from schemas.errors import SpecError

# On a trained ViT-Ti/16, re-compressed copies (JPEG quality 30 to 90, WebP 50) and copies of half the size keep a
# cosine of 0.88 and more in 97 of 100 cases, while different photographs stay below 0.7.
DEFAULT_THRESHOLD = 0.88

# Vectors of so many numbers are hashed at a time: what is computed on the way stays in the caches.
_HASHED_WORDS = 1 << 16
# The golden ratio in 64 bits, as multiplicative hashing takes it (Knuth, TAOCP 3, 6.4).
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Duplicates:
    """Members of all groups, sorted by group, the kept one first, then by falling score. Columns of one length."""

    row: Ints
    group: Ints
    keep: Mask
    score: Floats
    exact: Mask
    uri: pa.ChunkedArray

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return int(self.keep.sum())


def find_duplicates(
    store: FeatureStore, threshold: float = DEFAULT_THRESHOLD, *, feature: str = "cls", exact_only: bool = False
) -> Duplicates:
    """Groups of rows with the same bytes (`sha256`) or, unless `exact_only`, a cosine of at least `threshold`.

    Older versions of replaced objects do not take part. `exact_only` needs no vectors, so a run without features will
    do. Raises SpecError for a threshold outside (0, 1].
    """
    check_threshold(threshold)
    rows, originals = store.reread(lambda: same_bytes(store))
    if exact_only:
        return _describe(store, None, rows, originals)
    matrix = store.load(feature)
    joined = Components(len(matrix))
    first, second = matrix.positions_of(rows), matrix.positions_of(originals)
    known = (first >= 0) & (second >= 0)  # parts that were compacted meanwhile may hold newer rows
    joined.join(first[known], second[known])
    _join_near(store, matrix, joined, threshold)
    labels = joined.labels()
    members = np.flatnonzero(np.bincount(labels, minlength=len(labels))[labels] > 1)
    return _describe(store, matrix, matrix.rows[members], labels[members])


def check_threshold(threshold: float, option: str = "--threshold") -> None:
    """Raises SpecError naming the option unless 0 < `threshold` <= 1."""
    if not 0 < threshold <= 1:
        raise SpecError(f"{option} {threshold}: a cosine above 0 and at most 1 is needed, such as {DEFAULT_THRESHOLD}")


def same_bytes(store: FeatureStore) -> tuple[Ints, Ints]:
    """Ids of rows whose bytes occur more than once, and for each the lowest row of the same bytes."""
    hidden = pa.table({"row": pa.array(store.replaced, pa.int64())})
    with store.connect() as connection:
        connection.register("replaced", hidden)
        found = run_query(
            connection,
            "WITH live AS (SELECT row, sha256 FROM images ANTI JOIN replaced USING (row) WHERE sha256 IS NOT NULL), "
            "again AS (SELECT sha256, min(row) AS original FROM live GROUP BY sha256 HAVING count(*) > 1) "
            "SELECT row, original FROM live JOIN again USING (sha256)",
        )
    return found.column("row").to_numpy(), found.column("original").to_numpy()


def _join_near(store: FeatureStore, matrix: Matrix, joined: Components, threshold: float) -> None:
    """Join near vectors. Equal vectors are joined first and compared once, so that many copies cost little."""
    _join_equal(matrix, joined)
    for pairs in near_pairs(matrix, _representatives(matrix, joined), threshold, Preparation(), store.progress):
        joined.join(pairs.first, pairs.second)


def _join_equal(matrix: Matrix, joined: Components) -> None:
    copies, originals = _alike(matrix)
    # A hash alone joins nothing: what is joined may be deleted.
    equal = np.ones(len(copies), np.bool_)
    for span, left, right in _side_by_side(matrix, copies, originals):
        equal[span] = (left == right).all(axis=1)
    joined.join(copies[equal], originals[equal])


def _alike(matrix: Matrix) -> tuple[Ints, Ints]:
    """Positions, ascending, of vectors whose hash an earlier one has too, and of the first of each such hash."""
    hashes = _hashes(matrix)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    again = np.zeros(len(order), np.bool_)
    again[1:] = hashes[1:] == hashes[:-1]
    del hashes
    at, starts = np.flatnonzero(again), np.flatnonzero(~again)
    first = order[starts[np.searchsorted(starts, at) - 1]]
    found = np.argsort(order[at])
    candidates = np.flatnonzero(matrix.usable)
    return candidates[order[at][found]], candidates[first[found]]


def _representatives(matrix: Matrix, joined: Components) -> Ints:
    """One position of each component, ascending: exact copies may differ in nothing but the name."""
    candidates = np.flatnonzero(matrix.usable)
    _, first = np.unique(joined.labels()[candidates], return_index=True)
    return candidates[np.sort(first)]


def _hashes(matrix: Matrix) -> Any:
    """(n,) uint64 of each usable vector: equal for equal bits, different otherwise but for one chance in 2^64."""
    found = np.empty(int(matrix.usable.sum()), np.uint64)
    weights = np.random.default_rng(3).integers(0, 2**64, matrix.dim, np.uint64) | np.uint64(1)
    step = max(1, _HASHED_WORDS // matrix.dim)
    done = 0
    for _, vectors in matrix.chunks(release=True):
        words = np.ascontiguousarray(vectors).view(np.uint32)
        for start in range(0, len(words), step):
            mixed = words[start : start + step].astype(np.uint64)
            # Numbers of 16 bits end in zeros, and so would sums of their products: upper bits are mixed into the lower.
            mixed *= _ODD
            mixed ^= mixed >> np.uint64(32)
            found[done : done + len(mixed)] = mixed @ weights
            done += len(mixed)
    return found


def _describe(store: FeatureStore, matrix: Matrix | None, rows: Ints, labels: Ints) -> Duplicates:
    """Choose what is kept, score the others against it, and put all in order.

    Rows of one group have one label. Without a matrix each group is of the same bytes. Rows that are gone (an update
    replaced them meanwhile) are left out, and so are groups of which one row is left.
    """
    facts = _facts(store, rows)
    there = np.isin(rows, facts.rows)
    _, group_of, sizes = np.unique(labels[there], return_inverse=True, return_counts=True)
    rows, labels = rows[there][sizes[group_of] > 1], labels[there][sizes[group_of] > 1]
    at = np.searchsorted(facts.rows, rows)
    order = np.lexsort((rows, -facts.pixels[at], labels))
    labels, rows, at = labels[order], rows[order], at[order]
    keep = np.ones(len(labels), np.bool_)
    keep[1:] = labels[1:] != labels[:-1]
    number = np.cumsum(keep) - 1
    exact = facts.digests[at] == facts.digests[at][keep][number]
    score = np.ones(len(rows), np.float32)
    if matrix is not None:
        near = ~exact
        score[near] = _cosines(matrix, matrix.positions_of(rows[near]), matrix.positions_of(rows[keep][number][near]))
    # Groups are numbered by their lowest row, so that two runs of the command number them alike.
    lowest = np.minimum.reduceat(rows, np.flatnonzero(keep)) if len(rows) else rows
    group = np.argsort(np.argsort(lowest, kind="stable"), kind="stable")[number] if len(rows) else number
    final = np.lexsort((rows, -score, ~keep, group))
    return Duplicates(
        rows[final], group[final], keep[final], score[final], exact[final], facts.uris.take(pa.array(at[final]))
    )


class _Facts(NamedTuple):
    """What is asked of grouped rows: `rows` ascending, then columns in their order.

    `digests` are numbers: equal for equal SHA-256, and one of its own for a row that has none.
    """

    rows: Ints
    pixels: Ints
    digests: Ints
    uris: pa.ChunkedArray


def _facts(store: FeatureStore, rows: Ints) -> _Facts:
    """Facts of those of `rows` that are in `images/`. Python's own dictionaries would take several times as much."""
    wanted, names = pads.field("row").isin(pa.array(np.unique(rows))), ["row", "width", "height", "sha256", "uri"]
    table = store.reread(lambda: store.dataset().to_table(columns=names, filter=wanted))
    found = table.column("row").to_numpy()
    order = np.argsort(found, kind="stable")
    width, height = (pc.fill_null(table.column(name), 0).to_numpy().astype(np.int64) for name in ("width", "height"))
    # Offsets of 64 bits: all addresses together may well be more than 2 GiB.
    digests = table.column("sha256").cast(pa.large_string()).combine_chunks().dictionary_encode().indices
    numbers = pc.fill_null(digests.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    numbers = np.where(numbers < 0, -1 - found, numbers)
    uris = table.column("uri").cast(pa.large_string()).take(pa.array(order))
    return _Facts(found[order], (width * height)[order], numbers[order], uris)


def _cosines(matrix: Matrix, first: Ints, second: Ints) -> Floats:
    scores = np.zeros(len(first), np.float32)
    prepare = Preparation()
    for span, left, right in _side_by_side(matrix, first, second):
        scores[span] = np.einsum("ij,ij->i", prepare.apply(left), prepare.apply(right))
    return np.nan_to_num(scores).clip(-1, 1)


def _side_by_side(matrix: Matrix, first: Ints, second: Ints) -> Iterator[tuple[slice, Floats, Floats]]:
    """The vectors at `first[i]` and `second[i]`, (n, D) each, a chunk of the pairs at a time."""
    for start in range(0, len(first), matrix.chunk_rows):
        span = slice(start, start + matrix.chunk_rows)
        yield span, matrix.take(first[span]), matrix.take(second[span])


def write_duplicates(store: FeatureStore, found: Duplicates, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the groups to `duplicates/NAME/`, and beside it `NAME.delete.txt` and `NAME.json`; returns the latter.

    The list to delete has one address a line. An address that another row has too, be it kept or in no group, is not
    in it, nor is one that leads to a kept file by a link or in another spelling, nor one that would be read as several:
    with a line break, or a NUL. The summary counts the latter apart.
    """
    check_name(name)
    columns = {"row": found.row, "group": found.group, "keep": found.keep, "score": found.score}
    delete, shared, unsafe = _delete_list(store, found)
    summary = {
        **settings,
        "rows": len(store),
        "older": _older(store),
        "manifest_rows": store.record.manifest_rows,
        "groups": found.groups,
        "in_groups": len(found.row),
        "exact": int((found.exact & ~found.keep).sum()),
        "near": int((~found.exact).sum()),
        "to_delete": len(delete),
        "not_listed_because_kept_elsewhere": shared,
        "not_listed_because_of_line_breaks": unsafe,
        "kept": "most pixels, then lowest row",
        "run_id": store.record.run_id,
    }
    with replacing(store.fs, join(store.root, "duplicates"), name) as home:
        write_table(store.fs, join(home, name, "duplicates.parquet"), pa.table(columns))
        put_bytes(store.fs, join(home, f"{name}.delete.txt"), "".join(f"{uri}\n" for uri in delete).encode())
        write_json(store.fs, join(home, f"{name}.json"), summary)
    return summary


def _older(store: FeatureStore) -> int:
    """How many rows of older versions of objects still stand in `images/`."""
    if not len(store.replaced):
        return 0
    older = pads.field("row").isin(pa.array(store.replaced))
    return store.reread(lambda: int(store.dataset().count_rows(filter=older)))


def _delete_list(store: FeatureStore, found: Duplicates) -> tuple[list[str], int, int]:
    place = places()
    kept = {place(uri) for uri in found.uri.filter(pa.array(found.keep)).to_pylist()}
    dropped = list(dict.fromkeys(found.uri.filter(pa.array(~found.keep)).to_pylist()))
    candidates = [uri for uri in dropped if place(uri) not in kept]
    elsewhere = named_elsewhere(store, candidates, found.row[~found.keep])
    free = [uri for uri in candidates if uri not in elsewhere]
    # All that any reader of lines takes for the end of one; names may well hold blanks that are not "printable".
    safe = [uri for uri in free if uri.splitlines() == [uri] and "\0" not in uri]
    return safe, len(dropped) - len(free), len(free) - len(safe)
