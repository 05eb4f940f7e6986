"""What is done, read from what is visible: pending = manifest − replaced − images − failures."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from fsspec import AbstractFileSystem

from pipeline.settled import settled_listing
from pipeline.sinks import intervals
from pipeline.sinks.intervals import Spans
from pipeline.sinks.parts import DamagedPart, Part, gone, list_parts, read_row_numbers
from pipeline.storage import Options, filesystem

_READERS = 16
# Another shard may compact its parts between the listing and the look into one of them.
_LISTINGS = 5


class Ledger(NamedTuple):
    """Rows done, as spans. `twice` holds rows that stand more than once, which must not be."""

    parts: list[Part]
    images: Spans
    failures: Spans
    twice: Spans

    @property
    def done(self) -> Spans:
        """Rows that have ended in either place."""
        return intervals.union([self.images, self.failures])


def read_ledger(out: str, storage_options: Options, *, damaged_too: bool = False) -> Ledger:
    """List the parts under `out` and gather their rows. Only parts with gaps are opened.

    Raises OutputError naming a part that cannot be read; with `damaged_too` one that is damaged has no rows.
    """
    fs, path = filesystem(out, storage_options)
    for _ in range(_LISTINGS - 1):
        with suppress(FileNotFoundError):
            return _gather(fs, path, damaged_too)
    try:
        return _gather(fs, path, damaged_too)
    except FileNotFoundError as error:
        raise gone(out, error) from error


def settled_ledger(out: str, storage_options: Options, *, damaged_too: bool = False) -> Ledger:
    """As `read_ledger`, of a moment at which no parts are being rewritten: some of their rows are out of sight then.

    It waits for that. Raises OutputError where it lasts, as after a rewrite that was cut short.
    """
    fs, path = filesystem(out, storage_options)
    for found in settled_listing(out, fs, path, lambda: list_parts(fs, path)):
        ledger = read_ledger(out, storage_options, damaged_too=damaged_too)
        # A swap that began since the listing would have taken parts away.
        if set(found).issubset(ledger.parts):
            return ledger
    raise AssertionError("unreachable")


def _gather(fs: AbstractFileSystem, out: str, damaged_too: bool) -> Ledger:
    parts = list_parts(fs, out)
    with ThreadPoolExecutor(_READERS) as pool:
        covered = list(pool.map(lambda part: _spans(fs, out, part, damaged_too), parts))
    images = [spans for part, spans in zip(parts, covered, strict=True) if part.folder == "images"]
    failures = [spans for part, spans in zip(parts, covered, strict=True) if part.folder == "failures"]
    return Ledger(parts, intervals.union(images), intervals.union(failures), intervals.overlap(covered))


def _spans(fs: AbstractFileSystem, out: str, part: Part, damaged_too: bool) -> Spans:
    if part.dense:
        return np.array([[part.first, part.last + 1]], np.int64)
    try:
        return intervals.from_rows(read_row_numbers(fs, out, part))
    except DamagedPart:
        if not damaged_too:
            raise
        return intervals.EMPTY


def shard_rows(total: int, index: int, count: int) -> tuple[int, int]:
    """[first, stop) of one of `count` equal ranges of `total` rows."""
    return total * index // count, total * (index + 1) // count


def pending(ledger: Ledger, first: int, stop: int, replaced: Spans = intervals.EMPTY) -> Spans:
    """Rows of [first, stop) that are neither done nor replaced by a newer version of the same object."""
    return intervals.complement(intervals.union([ledger.done, replaced]), first, stop)
