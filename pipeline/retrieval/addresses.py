"""Addresses that several rows have: rows of a Parquet file go by the file and a name that is in it, and the address of
a signed URL is stored without its signature. Such rows may be one picture that is listed again, or different ones.
"""

import functools
import os
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from fsspec.implementations.local import LocalFileSystem

from pipeline.addresses import is_chained, real_name, scheme
from pipeline.retrieval.arrays import Ints, Mask
from pipeline.retrieval.store import FeatureStore

_SHOWN = 5
# What `places` remembers; addresses come folder by folder, more or less.
_FOLDERS = 1 << 16


def newest(store: FeatureStore, rows: Ints) -> Mask:
    """Which of `rows` hold the newest version of their object: no later row holds it anew."""
    mask: Mask = ~np.isin(rows, store.replaced)
    return mask


def different_pictures(store: FeatureStore, groups: Sequence[Sequence[int]]) -> Sequence[int] | None:
    """The first of `groups` whose rows hold different bytes; None where each group is one picture."""
    several = [rows for rows in groups if len(rows) > 1]
    if not several:
        return None
    found = store.lookup(np.concatenate([np.asarray(rows, np.int64) for rows in several]), ["sha256"])
    for rows in several:
        if len({found[row]["sha256"] for row in rows if row in found}) > 1:
            return rows
    return None


def named_rows(rows: Sequence[int]) -> str:
    """`rows 3, 5, 8`, the first few of many."""
    more = ", …" if len(rows) > _SHOWN else ""
    return f"rows {', '.join(str(row) for row in rows[:_SHOWN])}{more}"


def places() -> Callable[[str], str]:
    """A function from an address to the place that it leads to, the same for two spellings of one address (`file:`,
    `s3a:`), and for a file and a link to it, as the disks of this machine have them at the time."""
    folder_of = functools.lru_cache(_FOLDERS)(os.path.realpath)

    def place(uri: str) -> str:
        if "://" in uri and scheme(uri) != "file":
            return uri if is_chained(uri) else f"{scheme(uri)}://{uri.partition('://')[2]}"
        path = str(LocalFileSystem._strip_protocol(uri)) if "://" in uri else uri
        if "\0" in path:  # there is no such file
            return path
        if real_name(path) != path and not os.path.exists(path):
            path = real_name(path)
        folder, name = os.path.split(path)
        # All but the last name is looked up once for many files: on a disk far away each look takes its time.
        path = os.path.join(folder_of(folder), name)
        return os.path.realpath(path) if os.path.islink(path) else path

    return place


def named_elsewhere(store: FeatureStore, uris: Sequence[str], known: Ints) -> set[str]:
    """Those of `uris` that some row has that is neither among `known`, the rows they come from, nor replaced since.

    The rows go by in batches, of which only what is found is kept.
    """
    # Offsets of 64 bits: all addresses together may well be more than 2 GiB.
    asked = pads.field("uri").cast(pa.large_string()).isin(pa.array(uris, pa.large_string()))
    known = np.union1d(known, store.replaced)

    def read() -> set[str]:
        found: set[str] = set()
        for batch in store.dataset().to_batches(columns=["row", "uri"], filter=asked):
            rows = batch.column("row").to_numpy()
            # np.isin goes through all of `known` anew for each batch: seconds, where a run has a hundred million rows.
            others = known[np.minimum(np.searchsorted(known, rows), len(known) - 1)] != rows
            found.update(batch.column("uri").filter(pa.array(others)).to_pylist())
        return found

    return store.reread(read) if uris else set()
