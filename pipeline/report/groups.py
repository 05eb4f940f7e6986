"""What `kmeans` and `duplicates` left under DIR: rows in groups, the most telling ones first.

Rows that an update replaced since are no images any more, and are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.addresses import join
from pipeline.report.run import RunDirectory, batches
from pipeline.report.scan import ImageScan
from pipeline.report.text import thousands
from pipeline.results import list_results
from pipeline.settled import list_parquet
from pipeline.storage import read_json, redact
from schemas.errors import OutputError


@dataclass(frozen=True)
class Grouping:
    """Rows sorted by group and, within a group, best first. Group `i` is `rows[starts[i]:starts[i + 1]]`.

    `ids[i]` is the number that the files give the group. `values` are distances to the cluster's centre, or
    similarities to the picture that is kept; `keep` marks that picture (all False for clusters). `outdated` says
    that they lack images that came or were replaced since they were made, and is empty where none are known to.
    """

    name: str
    rows: NDArray[np.int64]
    values: NDArray[np.float32]
    keep: NDArray[np.bool_]
    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    outdated: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows in each group."""
        return np.diff(self.starts)

    def members(self, index: int) -> slice:
        """Where the rows of group `index` stand."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))


def load_clusterings(run: RunDirectory, scan: ImageScan) -> Iterator[Grouping]:
    """Each `clusters/NAME`, read when it is asked for: by cluster number, rows nearest to the centre first."""
    for name, table in _read(run, scan, "clusters", ["row", "cluster", "distance"]):
        distances = _floats(table, "distance")
        keep = np.zeros(len(table), bool)
        found = _group(name, _integers(table, "row"), _integers(table, "cluster"), distances, distances, keep)
        yield replace(found, outdated=_outdated(run, scan, "clusters", name, "run `patchstream kmeans` again"))


def load_duplicates(run: RunDirectory, scan: ImageScan) -> Iterator[Grouping]:
    """Each `duplicates/NAME`, read when it is asked for: largest group first, in each the picture to keep first, then
    the most similar. Groups are left out whose picture to keep is gone, or all others are."""
    for name, found in _read(run, scan, "duplicates", ["row", "group", "score", "keep"]):
        ids, sizes = np.unique(_integers(found, "group"), return_counts=True)
        kept = _integers(found.filter(found.column("keep")), "group")
        whole = ids[(sizes > 1) & np.isin(ids, kept)]
        table = found.filter(pa.array(np.isin(_integers(found, "group"), whole)))
        scores, keep = _floats(table, "score"), table.column("keep").to_numpy().astype(bool)
        ranks = np.where(keep, -np.inf, -scores).astype(np.float32)
        grouping = _by_size(_group(name, _integers(table, "row"), _integers(table, "group"), scores, ranks, keep))
        advice = "run `patchstream duplicates` again before deleting"
        yield replace(grouping, outdated=_outdated(run, scan, "duplicates", name, advice))


def _read(run: RunDirectory, scan: ImageScan, folder: str, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    for name in list_results(run.fs, join(run.root, folder)):
        paths = [path for path, _ in list_parquet(run.fs, join(run.root, folder, name))]
        parts = list(batches(run.fs, paths, columns))
        if sum(len(part) for part in parts):
            table = pa.Table.from_batches(parts)
            yield name, table.filter(pa.array(scan.holds(_integers(table, "row"))))


def _outdated(run: RunDirectory, scan: ImageScan, folder: str, name: str, advice: str) -> str:
    """That rows came since the result NAME was made, and what to do; empty where none came, or it does not say."""
    path = join(run.root, folder, f"{name}.json")
    try:
        record = read_json(run.fs, path)
    except ValueError as error:
        raise OutputError(f"{redact(path)} is damaged ({error}); {advice}") from error
    newer = _newer(run, scan, record) if isinstance(record, dict) else 0
    if newer <= 0:
        return ""
    return f"Made before {thousands(newer)} row{'s were' if newer > 1 else ' was'} added or replaced; {advice}."


def _newer(run: RunDirectory, scan: ImageScan, record: dict[str, Any]) -> int:
    """How many rows came since: the manifest grew, or images that were pending or had failed are there now."""
    known, seen = record.get("manifest_rows"), record.get("rows")
    added = run.record.manifest_rows - known if isinstance(known, int) else 0
    if not isinstance(seen, int):
        return added
    # Clusters count neither rows without a usable vector nor older versions, duplicates count both.
    beside = record["left_out"]["count"] if "left_out" in record else -record.get("older", 0)
    return max(added, scan.images - seen - int(beside))


def _integers(table: pa.Table, name: str) -> NDArray[np.int64]:
    values: NDArray[np.int64] = table.column(name).to_numpy().astype(np.int64)
    return values


def _floats(table: pa.Table, name: str) -> NDArray[np.float32]:
    values: NDArray[np.float32] = table.column(name).to_numpy().astype(np.float32)
    return values


def _group(
    name: str,
    rows: NDArray[np.int64],
    groups: NDArray[np.int64],
    values: NDArray[np.float32],
    ranks: NDArray[np.float32],
    keep: NDArray[np.bool_],
) -> Grouping:
    order = np.lexsort((rows, ranks, groups))
    ids, firsts = np.unique(groups[order], return_index=True)
    starts = np.append(firsts, len(rows)).astype(np.int64)
    return Grouping(name, rows[order], values[order], keep[order], ids, starts)


def _by_size(grouping: Grouping) -> Grouping:
    order = np.argsort(-grouping.sizes, kind="stable")
    sizes = grouping.sizes[order]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    gather = np.arange(len(grouping.rows)) + np.repeat(grouping.starts[order] - starts[:-1], sizes)
    return Grouping(
        grouping.name,
        grouping.rows[gather],
        grouping.values[gather],
        grouping.keep[gather],
        grouping.ids[order],
        starts,
    )


def common_labels(scan: ImageScan, rows: NDArray[np.int64], count: int) -> list[tuple[str, float]]:
    """The most frequent first labels of `rows`, and the share of `rows` that has each."""
    codes = scan.codes[rows[rows < len(scan.codes)]]
    codes = codes[codes >= 0]
    if not len(codes):
        return []
    counts = np.bincount(codes)
    best = np.argsort(-counts, kind="stable")[:count]
    return [(scan.names[code], float(counts[code] / len(rows))) for code in best if counts[code]]
