"""Approximate search: a faiss index under `DIR/index/NAME/`, with a record of what it was built from.

vectors.faiss    the index; the id of a vector is the id of its row
index.json       kind, feature, preparation, the run, the parts, recall; written last
"""

import errno
import os
from typing import Any, NamedTuple

import faiss
import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.addresses import join
from pipeline.retrieval.arrays import Floats, Ints, Preparation
from pipeline.retrieval.index_kinds import Kind, check_kind, kind_for, new_index, train
from pipeline.retrieval.matrix import Matrix
from pipeline.retrieval.output import check_name, list_folders, replacing, staged, write_json
from pipeline.retrieval.store import FeatureStore
from pipeline.storage import is_local, read_json, redact
from schemas.errors import OutputError


class IndexRecord(BaseModel):
    """`index.json`. `mean` is the vector taken away before indexing, or None; `search` holds faiss's parameter."""

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    feature: str
    dim: int
    rows: int
    left_out: int
    normalise: bool
    mean: list[float] | None
    lists: int | None
    search: dict[str, int]
    rescore: int
    run_id: str
    model_digest: str
    parts: dict[str, int]
    recall_at_10: float | None = None


class Index(NamedTuple):
    """An index in memory and its record."""

    faiss: Any
    record: IndexRecord

    @property
    def prepare(self) -> Preparation:
        """How its vectors were prepared; queries are prepared alike."""
        mean = None if self.record.mean is None else np.array(self.record.mean, np.float32)
        return Preparation(self.record.normalise, mean)


def build(
    store: FeatureStore, *, feature: str, kind: Kind | None, normalise: bool = True, centre: bool = False
) -> Index:
    """An index of all usable vectors, with a search parameter to begin with; `recall.tune` finds the right one.

    Raises as `trained`.
    """
    index, matrix = trained(store, feature, kind, normalise, centre)
    add(store, index.faiss, matrix, index.prepare, np.flatnonzero(matrix.usable))
    return index


def trained(
    store: FeatureStore, feature: str, kind: Kind | None, normalise: bool, centre: bool
) -> tuple[Index, Matrix]:
    """An index with no vector in it yet, whose record is of all usable ones, and the matrix that holds them.

    Raises OutputError if there is no such feature or it has no usable vector, SpecError for an unknown kind or too few
    vectors.
    """
    matrix = store.load(feature)
    rows = int(matrix.usable.sum())
    if rows == 0:
        raise OutputError(f"`{feature}` has no usable vector: all {len(matrix)} are zero or not finite")
    chosen = check_kind(kind) if kind else kind_for(rows, matrix.dim)
    prepare = store.preparation(feature, normalise=normalise, centre=centre)
    index, lists = new_index(chosen, matrix.dim, rows)
    store.progress("training", 0, 1)
    train(index, matrix, prepare, lists)
    return Index(index, describe(store, matrix, chosen, prepare, lists)), matrix


def describe(store: FeatureStore, matrix: Matrix, kind: Kind, prepare: Preparation, lists: int | None) -> IndexRecord:
    """The record of an index of all usable vectors."""
    return IndexRecord(
        kind=kind,
        feature=matrix.name,
        dim=matrix.dim,
        rows=int(matrix.usable.sum()),
        left_out=len(matrix.left_out),
        normalise=prepare.normalise,
        mean=None if prepare.mean is None else prepare.mean.tolist(),
        lists=lists,
        search={} if kind == "flat" else {"efSearch": 64} if kind == "hnsw" else {"nprobe": 8},
        # Quantised scores are rough: twenty times as many candidates are scored again with the vectors themselves.
        rescore=20 if kind == "ivf-pq" else 1,
        run_id=store.record.run_id,
        model_digest=store.record.model.digest,
        parts={part.name: part.bytes_ for part in store.parts},
    )


def add(store: FeatureStore, index: Any, matrix: Matrix, prepare: Preparation, positions: Ints) -> None:
    """Put vectors into a trained index."""
    done = 0
    for at, vectors in matrix.chunks(positions, release=True):
        index.add_with_ids(prepare.apply(vectors), matrix.rows[at])
        done += len(at)
        store.progress("indexing", done, len(positions))


def find(index: Index, matrix: Matrix, queries: Floats, k: int) -> tuple[Floats, Ints]:
    """Scores and positions (Q, k) by the index, best first. `queries` (Q, D) are prepared. Slots not filled are -1."""
    _set_parameters(index)
    wide = min(k * index.record.rescore, index.record.rows)
    scores, rows = index.faiss.search(np.ascontiguousarray(queries, np.float32), wide)
    positions = np.where(rows >= 0, matrix.positions_of(rows.ravel()).reshape(rows.shape), -1)
    if index.record.rescore > 1:
        scores, positions = _rescore(matrix, queries, positions, index.prepare)
    return scores[:, :k], positions[:, :k]


def _rescore(matrix: Matrix, queries: Floats, positions: Ints, prepare: Preparation) -> tuple[Floats, Ints]:
    scores = np.full(positions.shape, -np.inf, np.float32)
    for number, row in enumerate(positions):
        found = row >= 0
        scores[number, found] = prepare.apply(matrix.take(row[found])) @ queries[number]
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)


def _set_parameters(index: Index) -> None:
    target = index.faiss
    if index.record.kind == "hnsw":
        inner: Any = faiss.downcast_index(target.index)
        target = inner.hnsw
    for key, value in index.record.search.items():
        setattr(target, key, value)


def save(store: FeatureStore, index: Index, name: str) -> None:
    """Write an index to `DIR/index/NAME/`."""
    with replacing(store.fs, join(store.root, "index"), check_name(name)) as home:
        with staged(store.fs, join(home, name, "vectors.faiss")) as local:
            _write_faiss(index.faiss, str(local))
        write_json(store.fs, join(home, name, "index.json"), index.record.model_dump(mode="json"))


def _write_faiss(index: Any, path: str) -> None:
    try:
        faiss.write_index(index, path)
    except RuntimeError as error:  # faiss quotes what the system told it
        number = next((number for number in errno.errorcode if f"({os.strerror(number)})" in str(error)), 0)
        raise OSError(number, str(error)) from error


def load(store: FeatureStore, name: str, *, allow_stale: bool = False) -> Index:
    """The index NAME. Raises OutputError if there is none, or if it was built from other parts or another model."""
    folder = join(store.root, "index", check_name(name))
    damaged = f"index `{name}` is damaged or being rebuilt; run `patchstream index DIR --name {name}`"
    try:
        content = read_json(store.fs, join(folder, "index.json"))
        record = None if content is None else IndexRecord.model_validate(content)
    except ValueError as error:
        raise OutputError(f"{damaged} (index.json: {error})") from error
    if record is None:
        there = ", ".join(list_folders(store.fs, join(store.root, "index"))) or "none"
        place = f"{redact(store.root)}/index"
        raise OutputError(f"no index `{name}` under {place} (there: {there}); run `patchstream index`")
    if record.model_digest != store.record.model.digest:
        raise OutputError(f"index `{name}` was built from another model's vectors; build it anew")
    if not allow_stale:
        refuse_stale(name, stale(store, record))
    path = join(folder, "vectors.faiss")
    try:
        if is_local(store.fs):
            vectors = faiss.read_index(path)
        else:
            vectors = faiss.deserialize_index(np.frombuffer(store.fs.cat_file(path), np.uint8))
    except (RuntimeError, FileNotFoundError) as error:
        raise OutputError(damaged) from error
    if (vectors.d, vectors.ntotal) != (record.dim, record.rows):
        raise OutputError(damaged)
    return Index(vectors, record)


def refuse_stale(name: str, changes: str) -> None:
    """Raise OutputError where there are `changes` since the index was built."""
    if changes:
        raise OutputError(f"index `{name}` is stale: {changes}. Run `patchstream index DIR --name {name} --update`")


def exists(store: FeatureStore, name: str) -> bool:
    """Whether there is an index of this name, stale or not."""
    return read_json(store.fs, join(store.root, "index", check_name(name), "index.json")) is not None


def stale(store: FeatureStore, record: IndexRecord) -> str:
    """What changed in the run since the index was built; empty if nothing did."""
    if record.run_id != store.record.run_id:
        return "it was built from the vectors of another run"
    now = {part.name: part.bytes_ for part in store.parts}
    added = sum(1 for name, size in now.items() if record.parts.get(name) != size)
    gone = sum(1 for name, size in record.parts.items() if now.get(name) != size)
    return f"{added} parts were added and {gone} removed since" if added or gone else ""


def update(store: FeatureStore, name: str) -> tuple[Index, int]:
    """The index NAME brought up to date with the parts, and how many vectors were added. It is not saved.

    New rows are added to the trained index. It is built anew where rows are gone, where the new ones outnumber the
    old, or where the rows are another run's.
    """
    old = load(store, name, allow_stale=True)
    matrix = store.load(old.record.feature)
    usable = np.flatnonzero(matrix.usable)
    known = stored_rows(old)
    fresh = usable[~np.isin(matrix.rows[usable], known)]
    gone = len(known) - (len(usable) - len(fresh))
    if old.record.run_id != store.record.run_id or gone or len(fresh) > len(known):
        record = old.record
        centre = record.mean is not None
        index = build(store, feature=record.feature, kind=record.kind, normalise=record.normalise, centre=centre)
        return index, len(usable)
    add(store, old.faiss, matrix, old.prepare, fresh)
    record = describe(store, matrix, old.record.kind, old.prepare, old.record.lists)
    return Index(old.faiss, record.model_copy(update={"search": old.record.search})), len(fresh)


def stored_rows(index: Index) -> Ints:
    """Ids of the rows in an index."""
    if index.record.lists is None:
        return np.asarray(faiss.vector_to_array(index.faiss.id_map), np.int64)
    lists = index.faiss.invlists
    sizes = [lists.list_size(number) for number in range(lists.nlist)]
    ids = [faiss.rev_swig_ptr(lists.get_ids(number), size).copy() for number, size in enumerate(sizes) if size]
    return np.concatenate(ids) if ids else np.empty(0, np.int64)
