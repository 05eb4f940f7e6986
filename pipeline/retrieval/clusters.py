"""What `kmeans` leaves behind: the cluster of every row, sizes, medoids, and what distinguishes each cluster."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.addresses import join
from pipeline.retrieval.arrays import Floats, Ints, Preparation
from pipeline.retrieval.lloyd import Clustering, assign
from pipeline.retrieval.matrix import Matrix
from pipeline.retrieval.output import check_name, replacing, staged, write_json
from pipeline.retrieval.query import quote
from pipeline.retrieval.store import FeatureStore
from schemas.errors import SpecError

_SCHEMA = pa.schema([("row", pa.int64()), ("cluster", pa.int32()), ("distance", pa.float32())])
_TOP_LABELS = 5
_NAMED_ROWS = 20


@dataclass
class Members:
    """Per cluster: how many rows, and the row nearest to the centre, with its distance."""

    sizes: Ints
    medoids: Ints
    nearest: Floats

    def count(self, rows: Ints, numbers: Ints, distances: Floats) -> None:
        """Take in some rows, their clusters and distances."""
        self.sizes += np.bincount(numbers, minlength=len(self.sizes))
        for number in np.unique(numbers):
            inside = np.flatnonzero(numbers == number)
            best = inside[distances[inside].argmin()]
            if distances[best] < self.nearest[number]:
                self.nearest[number], self.medoids[number] = distances[best], rows[best]


def new_members(k: int) -> Members:
    """k clusters without rows."""
    return Members(np.zeros(k, np.int64), np.full(k, -1, np.int64), np.full(k, np.inf, np.float32))


def clusters_table(rows: Ints, vectors: Floats, found: Clustering, members: Members) -> pa.Table:
    """Rows with their cluster and distance: Euclidean, or 1 − cosine for spherical k-means."""
    numbers, squares = assign(vectors, found.centres)
    distances = (squares / 2 if found.spherical else np.sqrt(squares)).astype(np.float32)
    members.count(rows, numbers, distances)
    return pa.table({"row": rows, "cluster": numbers.astype(np.int32), "distance": distances}, schema=_SCHEMA)


def write_clusters(
    store: FeatureStore, matrix: Matrix, prepare: Preparation, found: Clustering, name: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Write `clusters/NAME/clusters.parquet` (row, cluster, distance), and beside the folder `NAME.json`, returned.

    `settings` goes into the JSON as it is. The centres go to `NAME.centres.npy`, (k, D) float32.
    """
    members = new_members(len(found.centres))
    done, total = 0, int(matrix.usable.sum())
    with replacing(store.fs, join(store.root, "clusters"), check_name(name)) as home:
        path = join(home, name, "clusters.parquet")
        with staged(store.fs, path) as local, pq.ParquetWriter(local, _SCHEMA) as writer:
            for at, vectors in matrix.chunks(release=True):
                writer.write_table(clusters_table(matrix.rows[at], prepare.apply(vectors), found, members))
                done += len(at)
                store.progress("writing clusters", done, total)
        return finish(store, matrix.left_out, found, members, join(home, name), settings)


def finish(
    store: FeatureStore, left_out: Ints, found: Clustering, members: Members, folder: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Write what goes beside the `folder` of a clustering, which is there, and give back the content of the JSON."""
    with staged(store.fs, f"{folder}.centres.npy") as local:
        np.save(local, found.centres)
    summary = {
        **settings,
        "k": len(found.centres),
        "kind": "spherical" if found.spherical else "euclidean",
        "inertia": found.inertia,
        "passes": found.rounds,
        "rows": int(members.sizes.sum()),
        "manifest_rows": store.record.manifest_rows,
        "left_out": {"count": len(left_out), "rows": left_out[:_NAMED_ROWS].tolist()},
        "run_id": store.record.run_id,
        "clusters": _describe(store, members, folder, settings.get("label_column")),
    }
    write_json(store.fs, f"{folder}.json", summary)
    return summary


def _describe(store: FeatureStore, members: Members, folder: str, label_column: str | None) -> list[dict[str, Any]]:
    # An update may have replaced some of them meanwhile: those clusters go without.
    there = store.lookup(members.medoids[members.medoids >= 0], ["uri"])
    labels = top_labels(store, folder, label_column)
    return [
        {
            "cluster": number,
            "size": int(size),
            "medoid": there.get(int(medoid)),
            "labels": labels.get(number, []),
        }
        for number, (size, medoid) in enumerate(zip(members.sizes, members.medoids, strict=True))
    ]


def check_label_column(store: FeatureStore, label_column: str | None) -> None:
    """Raise SpecError saying which columns there are unless `label_column` is one of them, or None."""
    if label_column is not None and label_column not in store.schema.names:
        raise SpecError(f"--label-column {label_column}: images/ has the columns {', '.join(store.schema.names)}")


def top_labels(store: FeatureStore, folder: str, label_column: str | None = None) -> dict[int, list[dict[str, Any]]]:
    """The labels that distinguish each cluster of `folder`, such as `DIR/clusters/NAME`, best first.

    `share` is how much of the cluster has the label, `base` how much of all rows. They are ordered by
    share · ln(share / base): what makes up much of a cluster and is rare elsewhere comes first. The label is the first
    of `labels`, or the content of `label_column`; one of blanks is none, but its row counts. Raises SpecError if that
    column is not there.
    """
    check_label_column(store, label_column)
    if label_column is None and "labels" not in store.schema.names:
        return {}
    # By table: the user's own columns may be named `cluster` or `distance` too.
    label = f"CAST(i.{quote(store.sql_name(label_column))} AS VARCHAR)" if label_column else "i.labels[1].label"
    found = store.sql(
        f"WITH named AS (SELECT c.cluster, {label} AS label FROM images i JOIN _clusters c ON i.row = c.row), "
        "counts AS (SELECT cluster, label, count(*) AS n FROM named GROUP BY ALL), "
        "shares AS (SELECT cluster, label, n / sum(n) OVER (PARTITION BY cluster) AS share, "
        "sum(n) OVER (PARTITION BY label) / sum(n) OVER () AS base FROM counts) "
        "SELECT cluster, label, share, base FROM shares WHERE share > base AND trim(label) <> '' "
        "QUALIFY row_number() OVER (PARTITION BY cluster ORDER BY share * ln(share / base) DESC, label) "
        f"<= {_TOP_LABELS} ORDER BY cluster, share * ln(share / base) DESC, label",
        {"_clusters": folder},
    )
    labels: dict[int, list[dict[str, Any]]] = {}
    for item in found.to_pylist():
        labels.setdefault(item.pop("cluster"), []).append(item)
    return labels
