"""Label every row of a run with a trained head, at the speed of memory: no image is read.

The result is a directory like any run's, with the same rows, the new labels, and no features.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.addresses import join
from pipeline.encoding import encode
from pipeline.retrieval.arrays import Floats, Ints, directed, lengths
from pipeline.retrieval.head import HeadRecord, load_head
from pipeline.retrieval.logistic import Linear, softmax
from pipeline.retrieval.matrix import Matrix
from pipeline.retrieval.output import staged
from pipeline.retrieval.parts import Part, open_parquet
from pipeline.retrieval.store import FeatureStore
from pipeline.settled import list_parquet
from pipeline.storage import Options, exists, filesystem, put_bytes, read_json, redact, remove
from schemas.errors import OutputError, SpecError
from schemas.run import AppliedHead, RunRecord, difference
from schemas.spec import FEATURE_NAMES
from schemas.tables import LABEL, METADATA_KEY

_NAMED_ROWS = 20
# Keys of the spec that say how the run came to labels of its own.
_OF_OTHER_LABELS = ("zero_shot", "templates", "vocabulary", "label_file", "head")


def apply_head(
    store: FeatureStore, name: str, out: str, *, top_k: int = 1, storage_options: Options | None = None
) -> dict[str, Any]:
    """Write the labels of probe NAME for every row of `store` to the directory `out`, and return a summary.

    Rows whose vector is zero or not finite get no labels. Parts that are there already are kept, so an interrupted
    command goes on where it was; those whose part the run has no more are replaced, so that the rows stay the run's.
    Raises OutputError if there is no such probe or `out` holds anything else, SpecError if the head has not `top_k`
    labels.
    """
    linear, head, digest = load_head(store, name)
    if not 1 <= top_k <= len(head.labels):
        raise SpecError(f"--top-k {top_k}: the head has {len(head.labels)} labels; choose between 1 and that")
    fs, root = filesystem(out, storage_options or {})
    root = root.rstrip("/")
    record = _new_record(store, head, digest, top_k)
    _open_out(store, fs, root, record)
    matrix = store.load(head.feature)  # before anything is removed: this is what may lack the room
    _remove_stale(store, fs, root, record)
    _copy_failures(store, fs, root, record)
    done = set(_names(fs, root, "images"))
    start = 0
    for number, part in enumerate(store.parts):
        if part.name not in done:
            table = _labelled_part(store, part, matrix, start, linear, head.labels, top_k)
            _write(fs, join(root, "images", part.name), table, record)
        start += part.rows
        store.progress("labelling", number + 1, len(store.parts))
    unlabelled = matrix.left_out
    return {
        "out": out,
        "rows": len(store),
        "labels": len(head.labels),
        "unlabelled": {"count": len(unlabelled), "rows": unlabelled[:_NAMED_ROWS].tolist()},
    }


def _new_record(store: FeatureStore, head: HeadRecord, digest: str, top_k: int) -> RunRecord:
    kept = store.record
    applied = AppliedHead(
        probe=head.name, digest=digest, feature=head.feature, trained_on=head.run_id, run_id=kept.run_id
    )
    changes = {
        "run_id": f"{kept.run_id}-{digest[:8]}-{top_k}",
        "spec": {**kept.spec, **dict.fromkeys(_OF_OTHER_LABELS), "features": [], "labels": top_k},
        "model": kept.model.model_copy(
            update={
                "num_labels": len(head.labels),
                "multi_label": False,
                "zero_shot": None,
                "label_digest": None,
                "head": digest,
            }
        ),
        "feature_dims": {},
        "applied": applied,
    }
    return kept.model_copy(update=changes)


def _open_out(store: FeatureStore, fs: Any, root: str, record: RunRecord) -> None:
    """Bring the manifest and the record in `out` up to date; raise OutputError where it holds anything else.

    The record comes last: with parts of our manifest and no record, an earlier command was cut short.
    """
    there = read_json(fs, join(root, "run.json"))
    wanted = record.model_dump(mode="json")
    copied: list[str] = []
    if there is not None:
        copied = list(there.get("manifest_parts") or [])
        # `embed --update` adds parts to the manifest of a run; what is there stays right.
        follows = copied == record.manifest_parts[: len(copied)]
        lines = difference({**there, **_growing(wanted)} if follows else there, wanted)
        if lines:
            listed = "\n  ".join(lines)
            raise OutputError(f"{redact(root)} holds another result:\n  {listed}\nChoose another --out.")
    elif not _holds_only_manifest(store, fs, root):
        raise OutputError(f"{redact(root)} is not empty and no run's directory; choose another --out")
    for name in record.manifest_parts[len(copied) :]:
        with staged(fs, join(root, "manifest", name)) as local:
            store.fs.get_file(join(store.root, "manifest", name), str(local))
    if there != wanted:
        put_bytes(fs, join(root, "run.json"), record.model_dump_json(indent=1).encode())


def _growing(record: dict[str, Any]) -> dict[str, Any]:
    """What `embed --update` changes in a record."""
    return {key: record[key] for key in ("manifest_rows", "manifest_parts")}


def _holds_only_manifest(store: FeatureStore, fs: Any, root: str) -> bool:
    """Whether `root` is empty, or holds nothing but parts of the run's manifest, as large as they are there."""
    if not exists(fs, root):
        return True
    names = [str(path).rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False)]
    if any(name != "manifest" and not name.startswith(".run.json.") for name in names):
        return False
    found, ours = (
        {(path.rpartition("/")[2], size) for path, size in list_parquet(some, join(base, "manifest"))}
        for some, base in ((fs, root), (store.fs, store.root))
    )
    return found <= ours


def _remove_stale(store: FeatureStore, fs: Any, root: str, record: RunRecord) -> None:
    """Delete parts of ours that the run has no more: it was retried or compacted, and their rows stand in others.

    Files that this command did not write are left alone.
    """
    for kind in ("images", "failures"):
        current = {part.name for part in store.parts} if kind == "images" else set(_names(store.fs, store.root, kind))
        for name in set(_names(fs, root, kind)) - current:
            path = join(root, kind, name)
            with open_parquet(fs, path) as file:
                ours = record.describes((file.schema_arrow.metadata or {}).get(METADATA_KEY))
            if ours:
                remove(fs, path)


def _names(fs: Any, root: str, kind: str) -> list[str]:
    return [path.rpartition("/")[2] for path, _ in list_parquet(fs, join(root, kind))]


def _copy_failures(store: FeatureStore, fs: Any, root: str, record: RunRecord) -> None:
    """The run's failures as they are now. A part of the same name may tell of a later attempt, so all are written."""
    for name in _names(store.fs, store.root, "failures"):
        with open_parquet(store.fs, join(store.root, "failures", name)) as file:
            _write(fs, join(root, "failures", name), file.read(), record)


def _write(fs: Any, path: str, table: pa.Table, record: RunRecord) -> None:
    put_bytes(fs, path, encode(table, record.part_metadata()))


def _labelled_part(
    store: FeatureStore, part: Part, matrix: Matrix, start: int, linear: Linear, names: list[str], top_k: int
) -> pa.Table:
    computed = {*FEATURE_NAMES, "labels"}
    columns = [name for name in store.schema.names if name not in computed]
    with open_parquet(store.fs, part.path) as file:
        table = file.read(columns=columns)
    step, stop = matrix.chunk_rows_for(len(names)), start + part.rows
    labels = pa.chunked_array(
        [_labels(linear, matrix.vectors[at : min(at + step, stop)], names, top_k) for at in range(start, stop, step)],
        pa.list_(LABEL),
    )
    matrix.release(start, stop)
    return table.add_column(2, pa.field("labels", pa.list_(LABEL)), labels)


def _labels(linear: Linear, block: Any, names: list[str], top_k: int) -> pa.Array:
    vectors: Floats = block.astype(np.float32, copy=False)
    good = directed(lengths(vectors))
    logits = linear.logits(np.where(good[:, None], vectors, 0) if not good.all() else vectors)
    # By logits, not by scores: all those behind a label that is almost certain may be 0 in float32.
    best: Ints = np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]
    order = np.argsort(-np.take_along_axis(logits, best, 1), axis=1, kind="stable")
    best = np.take_along_axis(best, order, 1)[good]
    chosen = np.take_along_axis(softmax(logits)[good], best, 1)
    items = pa.StructArray.from_arrays(
        [
            pa.array(best.ravel().astype(np.int32)),
            pa.array(names).take(pa.array(best.ravel())),
            pa.array(chosen.ravel().astype(np.float32)),
        ],
        fields=list(LABEL),
    )
    offsets = np.concatenate([[0], np.cumsum(good * top_k)]).astype(np.int32)
    missing = pa.array(~good) if not good.all() else None
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=pa.list_(LABEL), mask=missing)
