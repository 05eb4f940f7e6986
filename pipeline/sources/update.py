"""`--update`: of what the sources list now, the rows that are new or changed since the manifest was frozen."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.signals import heeding_signals
from pipeline.sources.manifest import ManifestPart, read_columns
from pipeline.storage import Options
from pipeline.store_errors import NO_ROOM
from schemas.errors import OutputError
from schemas.redaction import LOGIN_PLACE

if TYPE_CHECKING:
    import duckdb

# For row numbers, which of them have their image.
Done = Callable[[np.ndarray], np.ndarray]

# Beyond it DuckDB goes on on the disk, in the same temporary folder.
_MEMORY = "512MiB"

_USER = re.compile(LOGIN_PLACE + "[^/?#]*@")
# Parameters that sign a URL, by the one that shows that it is signed in this way: S3 and Google Cloud Storage (v4),
# both in their older form and CloudFront, Azure (SAS).
_SIGNATURES = {
    "x-amz-signature": re.compile("x-amz-.*"),
    "x-goog-signature": re.compile("x-goog-.*"),
    "signature": re.compile("signature|expires|policy|key-pair-id|awsaccesskeyid|googleaccessid|x-amz-security-token"),
    "sig": re.compile("sig|s[eiprstv]|sdd|ses|sip|spr|srt|scid|sk[estv]|skoid|sktid|saoid|suoid"),
}
# Two rows are the same object if they share an address, the n-th of that address there with the n-th here: a table
# may name an image twice, and sources may overlap. Known copies stand in the order of the rows that they began as: one
# that has changed is behind all others by its own number. An object without ETag and size (a plain URL) counts as
# unchanged; but one that has no image yet is taken up again under another address, because the signature in its own may
# be over.
_COMPARE = """
    with recursive links as materialized (
        select row, replaces from known where replaces is not null
    ), begun as (
        select row, replaces as root from links anti join (select replaces as row from links) using (row)
        union all
        select begun.row, links.replaces from begun join links on links.row = begun.root
    ), roots as (
        select row, min(root) as root from begun group by row
    ), live as (
        select row, key, url, etag, size, done,
            row_number() over (partition by key order by coalesce(root, row)) as copy
        from known anti join (select replaces as row from links) using (row) left join roots using (row)
    ), seen as (
        select place, key, url, etag, size, row_number() over (partition by key order by place) as copy from listed
    )
    select place, live.row as replaces
    from seen left join live using (key, copy)
    where live.row is null
       or (seen.etag is not null and seen.etag is distinct from live.etag)
       or (seen.size is not null and seen.size is distinct from live.size)
       or (not live.done and seen.url <> live.url)
    order by place
"""


def new_and_changed(
    tables: Iterable[pa.Table], out: str, parts: list[ManifestPart], done: Done, storage_options: Options
) -> Iterator[pa.Table]:
    """Rows of `tables` whose address is unknown, or known with another etag or size, or with another signature where
    the row is not `done`.

    A changed row carries the row it replaces in `replaces`. What is listed waits on the local disk until all of it
    is there, and DuckDB compares it there: neither side need fit into memory.
    Raises OutputError where that disk has no room.
    """
    import duckdb  # here, because every job imports this file and few update

    try:
        yield from _compared(tables, out, parts, done, storage_options)
    except (duckdb.Error, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_ROOM:
            raise
        raise OutputError(
            f"the listing could not be compared with the manifest: {error}. Both lie in {tempfile.gettempdir()} "
            "meanwhile: make room there, or name another folder with TMPDIR"
        ) from None


def _compared(
    tables: Iterable[pa.Table], out: str, parts: list[ManifestPart], done: Done, storage_options: Options
) -> Iterator[pa.Table]:
    import duckdb

    with tempfile.TemporaryDirectory(prefix="patchstream-update-") as folder:
        with duckdb.connect(f"{folder}/compare.duckdb", config={"memory_limit": _MEMORY}) as database:
            facts = "key varchar, url ubigint, etag varchar, size bigint"
            _execute(database, f"create table known (row bigint, {facts}, replaces bigint, done boolean)")
            _execute(database, f"create table listed (place bigint, {facts})")
            _load_known(database, out, parts, done, storage_options)
            files = _set_aside(tables, database, folder)
            found = heeding_signals(lambda: database.sql(_COMPARE).to_arrow_table(), database.interrupt)
        yield from _picked(files, found["place"].to_numpy(), found["replaces"].combine_chunks())


def replaced_rows(out: str, parts: list[ManifestPart], storage_options: Options) -> np.ndarray:
    """Rows that rows of `parts` (the parts that updates added) replace; int64, any order."""
    batches = read_columns(out, parts, ["replaces"], storage_options)
    return np.concatenate([np.empty(0, np.int64), *(batch.column(0).drop_null().to_numpy() for batch in batches)])


def _load_known(
    database: duckdb.DuckDBPyConnection, out: str, parts: list[ManifestPart], done: Done, storage_options: Options
) -> None:
    for batch in read_columns(out, parts, ["row", "uri", "etag", "size", "replaces"], storage_options):
        row, uri, etag, size, replaces = batch.columns
        has_image = pa.array(done(row.to_numpy()))
        _insert(database, "known", [row, _keys(uri), uri, etag, size, replaces, has_image])


def _set_aside(tables: Iterable[pa.Table], database: duckdb.DuckDBPyConnection, folder: str) -> list[tuple[str, int]]:
    """Write `tables` as Arrow files and their keys into the database; returns (file, rows), in order."""
    files: list[tuple[str, int]] = []
    place = 0
    for table in tables:
        name = f"{folder}/{len(files):08d}.arrow"
        with pa.OSFile(name, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        files.append((name, len(table)))
        columns = [table[column].combine_chunks() for column in ("uri", "etag", "size")]
        places = pa.array(np.arange(place, place + len(table)))
        _insert(database, "listed", [places, _keys(columns[0]), *columns])
        place += len(table)
    return files


def _insert(database: duckdb.DuckDBPyConnection, table: str, columns: list[pa.Array]) -> None:
    """`columns` in the order of `table`'s, the full address in the place of its hash."""
    names = [name for (name,) in _execute(database, f"select name from pragma_table_info('{table}')")]
    database.register("batch", pa.table(columns, names=names))
    _execute(database, f"insert into {table} select * replace (hash(url) as url) from batch")
    database.unregister("batch")


def _execute(database: duckdb.DuckDBPyConnection, statement: str) -> list[tuple[str, ...]]:
    return heeding_signals(lambda: database.execute(statement).fetchall(), database.interrupt)


def _keys(uris: pa.Array) -> pa.Array:
    """Addresses without their signatures: a URL that was signed anew is still the same object."""
    if not pc.any(pc.match_substring_regex(uris, "[?@]")).as_py():
        return uris
    return pa.array([unsigned(uri) for uri in uris.to_pylist()], pa.string())


def unsigned(url: str) -> str:
    """`url` without user, password and the parameters that sign it.

    Not `redact`: that hides whatever may be secret, and `?token=7` may well be what tells one object from the next.
    """
    if "://" not in url:
        return url
    url = _USER.sub("", url)
    address, _, rest = url.partition("?")
    query, mark, fragment = rest.partition("#")
    parameters = {part: part.partition("=")[0].lower() for part in query.split("&")}
    signing = [family for name, family in _SIGNATURES.items() if name in parameters.values()]
    kept = [part for part, name in parameters.items() if not any(family.fullmatch(name) for family in signing)]
    return address + ("?" + "&".join(kept) if any(kept) else "") + mark + fragment


def _picked(files: list[tuple[str, int]], places: np.ndarray, replaces: pa.Array) -> Iterator[pa.Table]:
    first = 0
    for name, rows in files:
        low, high = np.searchsorted(places, [first, first + rows])
        if high > low:
            with pa.OSFile(name, "rb") as source:
                table = pa.ipc.open_file(source).read_all().take(pa.array(places[low:high] - first))
            marks = replaces.slice(low, high - low)
            yield table.set_column(table.column_names.index("replaces"), "replaces", marks)
        first += rows
