"""Which reads serve a manifest: one for an object, one for a run of neighbours in a tar or a table."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

# A run of tar members is read in one piece up to this size; the gaps between them (headers, sidecars) up to the other.
RUN_BYTES = 8 << 20
GAP_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class ObjectRead:
    """A whole file. `size` in bytes where the listing told it."""

    url: str
    size: int | None

    @property
    def rows(self) -> int:
        return 1


class Member(NamedTuple):
    """A file in a tar: where its bytes lie, and its name there."""

    offset: int
    length: int
    name: str


@dataclass(frozen=True, slots=True)
class RangeRead:
    """Members of one tar, in manifest order, of one stretch of it; each is preceded by its header.

    `etag` is that of the container when it was listed, where it has one: the places hold for no other.
    """

    url: str
    members: tuple[Member, ...]
    etag: str | None = None

    @property
    def rows(self) -> int:
        return len(self.members)

    @property
    def start(self) -> int:
        return self.members[0].offset

    @property
    def nbytes(self) -> int:
        last = self.members[-1]
        return last.offset + last.length - self.start


@dataclass(frozen=True, slots=True)
class TableRead:
    """One row of a Parquet table: the `position`-th of the ascending row numbers of `run`, read in one pass.

    `etag` as for a `RangeRead`; it ends with the table's size in hexadecimal digits.
    """

    url: str
    run: tuple[int, ...]
    position: int
    etag: str | None = None

    @property
    def rows(self) -> int:
        return 1


Read = ObjectRead | RangeRead | TableRead


class _Row(NamedTuple):
    uri: str
    container: str | None
    offset: int
    length: int | None
    size: int | None
    etag: str | None


def plan_reads(manifest: pa.Table) -> Iterator[Read]:
    """Reads that cover every row of `manifest` once, in its order."""
    columns = [manifest.column(name).to_pylist() for name in _Row._fields]
    group: list[_Row] = []
    for row in map(_Row._make, zip(*columns, strict=True)):
        if group and not _joins(group, row):
            yield from _reads(group)
            group = []
        group.append(row)
    if group:
        yield from _reads(group)


def _joins(group: list[_Row], row: _Row) -> bool:
    last = group[-1]
    if row.container is None or (row.container, row.etag) != (last.container, last.etag):
        return False
    if (row.length is None) != (last.length is None):
        return False
    if row.length is None or last.length is None:
        return row.offset > last.offset
    gap = row.offset - (last.offset + last.length)
    return 0 <= gap <= GAP_BYTES and row.offset + row.length - group[0].offset <= RUN_BYTES


def _reads(group: list[_Row]) -> Iterator[Read]:
    first = group[0]
    if first.container is None:
        yield ObjectRead(first.uri, first.size)
    elif first.length is None:
        run = tuple(row.offset for row in group)
        yield from (TableRead(first.container, run, position, first.etag) for position in range(len(run)))
    else:
        within = len(first.container) + 1
        members = tuple(Member(row.offset, row.length or 0, row.uri[within:]) for row in group)
        yield RangeRead(first.container, members, first.etag)
