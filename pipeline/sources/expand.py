"""One source string to the manifest rows behind it, whatever it turns out to be."""

import logging
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa

from pipeline.addresses import behind_caches, is_chained, scheme
from pipeline.logs import warn_once
from pipeline.sources.columns import content_table, shown_name
from pipeline.sources.listing import address_of, list_source, named_by, wanted
from pipeline.sources.stores import Entry
from pipeline.sources.tables import BATCH_ROWS, parquet_kind, read_image_table, read_uri_table, suffix
from pipeline.sources.tar import COMPRESSED, SIDECARS, TarImage, list_tar
from pipeline.sources.text import TEXT_SUFFIXES
from pipeline.storage import filesystem, is_local, redact
from schemas.errors import SourceError, SpecError
from schemas.spec import JobSpec

_log = logging.getLogger(__name__)

Tables = Iterable[pa.Table]

# Shards and image tables that are listed side by side: on an object store each is mostly waiting.
_AHEAD = 8


def expand(source: str, spec: JobSpec) -> Iterator[pa.Table]:
    """Manifest rows (without `row`) of one source, in batches and in the order of the listing.

    A text table is one only where it is named as such (`labels.csv`, `tables/*.csv`), because a stray CSV beside
    images is no list of images. Tar shards and Parquet tables are opened wherever they turn up.
    Raises SourceError when the source cannot be read, SpecError when it lies in the output.
    """
    if (shown := shown_name(source)) != source:
        raise SourceError(
            f"{redact(shown)} holds bytes that are no UTF-8, which the record of a run cannot; name the folder above "
            "it, or write ? for each of them"
        )
    path = source.partition("?")[0] if scheme(source) == "http" else source  # elsewhere a ? stands for a character
    if path.lower().endswith(COMPRESSED):
        raise SourceError(
            f"{redact(source)} is a compressed tar, whose members cannot be read by range; unpack it "
            "(`gunzip`, `zstd -d` …) and give the .tar"
        )
    entries = list_source(source, spec.storage_options)
    if suffix(source) in TEXT_SUFFIXES:
        for entry in entries:
            tables = read_uri_table(entry.uri, spec.uri_column, spec.storage_options)
            yield from _chosen(tables, entry, spec)
        return
    named = suffix(source.rstrip("/")) == "parquet"  # a shell completes the name of a folder with a slash
    items = _batches(_without_output(entries, source, spec), spec, named)
    yield from in_order(items, _AHEAD if spec.limit is None else 0)


def _batches(entries: Iterator[Entry], spec: JobSpec, named: bool) -> Iterator[pa.Table | Callable[[], Tables]]:
    """Batches of plain objects, and a call for each object that may hold rows itself."""
    plain: list[Entry] = []
    for entry in entries:
        kind = suffix(entry.uri)
        holds_rows = kind in {"tar", "parquet"} and not named_by(entry.uri, spec.exclude)
        if named and kind != "parquet":
            continue  # beside the parts of a table's folder lie `_SUCCESS` and the like
        if not holds_rows and wanted(entry.uri, spec.include, spec.exclude):
            plain.append(entry)
        if plain and (holds_rows or len(plain) == BATCH_ROWS):
            yield _plain_table(plain)
            plain = []
        if holds_rows:
            yield partial(_tar_rows if kind == "tar" else partial(_parquet_rows, named=named), entry, spec)
    if plain:
        yield _plain_table(plain)


def in_order(items: Iterable[pa.Table | Callable[[], Tables]], ahead: int) -> Iterator[pa.Table]:
    """Tables as they are, and those of calls, of which up to `ahead` run in advance; all in the order of `items`."""
    waiting: deque[Future[Tables]] = deque()
    pool = ThreadPoolExecutor(max(1, ahead), thread_name_prefix="patchstream-list")
    try:
        for item in items:
            if isinstance(item, pa.Table) and not waiting:
                yield item
                continue
            waiting.append(pool.submit(partial(list, [item]) if isinstance(item, pa.Table) else item))
            while len(waiting) > ahead:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        # Of calls that are running none is waited for: after an error or Ctrl-C nobody wants their tables, and the
        # listing of a large shard takes minutes. At the regular end there are none.
        pool.shutdown(wait=False, cancel_futures=True)


def _tar_rows(entry: Entry, spec: JobSpec) -> Tables:
    """All rows of a shard, in one table."""
    images: list[TarImage] = []
    broken: list[pa.Table] = []
    try:
        for image in list_tar(entry.uri, spec.storage_options):
            images.append(image)
    except tarfile.ReadError as error:
        # The shard itself becomes a row, so that what could not be listed shows up among the failures.
        _log.warning("%s", redact(str(error)))
        broken = [_plain_table([entry])]
    tables = [_tar_table(entry, images)] if images else []
    return [*_chosen(tables, entry, spec), *broken]


def _parquet_rows(entry: Entry, spec: JobSpec, *, named: bool) -> Tables:
    """The rows of a table. One of addresses may be long, and is read as its turn comes."""
    kind = parquet_kind(entry.uri, spec.uri_column, spec.image_column, spec.storage_options)
    if kind is None and named:
        raise SourceError(f"{redact(entry.uri)} is not a Parquet file")
    if kind is not None and kind.images is not None:
        if kind.left_out:
            _tell_left_out(kind.images, kind.left_out)
        rows, held = kind.group
        if rows >= _MANY_ROWS and held >= _MANY_BYTES:
            _tell_large_groups(rows, redact(entry.uri))
        return list(_chosen(read_image_table(entry, kind, spec.storage_options), entry, spec))
    # What an earlier run wrote names images too, but is asked for only where it is named.
    if kind is not None and kind.uris is not None and (named or not kind.ours):
        return _chosen(read_uri_table(entry.uri, kind.uris, spec.storage_options), entry, spec)
    if named:
        raise SourceError(
            f"{redact(entry.uri)} has neither a column `{spec.uri_column}` with addresses nor one column with image "
            f"bytes (`{spec.image_column}` is none); name the right one with --uri-column or --image-column"
        )
    if kind is not None and kind.uris is not None:
        _tell_ours(entry.uri)
    return [_plain_table([entry])] if wanted(entry.uri, spec.include, spec.exclude) else []


# From here on each image is read twice, and it is felt.
_MANY_ROWS = 4 * 1024
_MANY_BYTES = 256 << 20


def _tell_large_groups(rows: int, table: str) -> None:
    warn_once(
        _log,
        ("large groups",),
        "%s has row groups of up to %s rows, and a decoding task reads its own from the beginning: images are read "
        "about %d times. Written anew with row_group_size=1000 they are read once (docs/sources.md)",
        table,
        f"{rows:,}",
        rows // 2048,
    )


def _tell_ours(table: str) -> None:
    warn_once(
        _log,
        ("ours", table.rpartition("/")[0]),
        "%s begins with the columns of what a run writes and is taken for a part of one: the addresses in it, and in "
        "others like it in the same folder, are left out. To take them give the file itself as a source, or *.parquet",
        redact(table),
    )


def _tell_left_out(images: str, columns: tuple[str, ...]) -> None:
    warn_once(
        _log,
        (images, *columns),
        "the images are those of column `%s`; other columns that hold bytes do not ride along: %s. "
        "--image-column names the one to take",
        images,
        ", ".join(f"`{name}`" for name in columns),
    )


def _chosen(tables: Tables, container: Entry, spec: JobSpec) -> Iterator[pa.Table]:
    """The rows that pass --include and --exclude; an --include that names the container takes all that is in it."""
    include = () if spec.include and named_by(container.uri, spec.include) else spec.include
    for table in tables:
        if not include and not spec.exclude:
            yield table
            continue
        keep = [wanted(uri, include, spec.exclude, container.uri) for uri in table["uri"].to_pylist()]
        yield table.filter(pa.array(keep, pa.bool_()))


def _tar_table(entry: Entry, images: list[TarImage]) -> pa.Table:
    fixed: dict[str, Sequence[Any]] = {
        "container": [entry.uri] * len(images),
        "offset": [image.offset for image in images],
        "length": [image.length for image in images],
        "size": [image.length for image in images],
        "etag": [entry.etag] * len(images),
    }
    present = [name for name in SIDECARS if any(name in image.sidecars for image in images)]
    sidecars = {name: pa.array([image.sidecars.get(name) for image in images], pa.string()) for name in present}
    return content_table([f"{entry.uri}#{image.name}" for image in images], fixed, pa.table(sidecars))


def _plain_table(entries: list[Entry]) -> pa.Table:
    fixed: dict[str, Sequence[Any]] = {
        "size": [entry.size for entry in entries],
        "etag": [entry.etag for entry in entries],
    }
    return content_table([entry.uri for entry in entries], fixed)


def _without_output(entries: Iterator[Entry], source: str, spec: JobSpec) -> Iterator[Entry]:
    """What an earlier attempt wrote below the source is no input. Raises SpecError where that would be all of it."""
    inside = _folder(spec.out, spec)
    behind = behind_caches(source)
    one_store = scheme(behind) == scheme(spec.out) and not is_chained(behind)
    if one_store and _folder(behind, spec).startswith(inside):
        raise SpecError(
            f"{redact(source)} lies in --out {redact(spec.out)}, and what lies there is no input; choose an --out "
            "below the source or beside it"
        )
    if scheme(behind) != "file":
        return (entry for entry in entries if not behind_caches(entry.uri).startswith(inside))
    # A folder may be named by several paths, through links; thousands of entries share one.
    real = lru_cache(1024)(os.path.realpath)
    paths = ((entry, behind_caches(entry.uri).removeprefix("file://")) for entry in entries)
    return (entry for entry, path in paths if not f"{real(os.path.dirname(path))}/".startswith(inside))


def _folder(url: str, spec: JobSpec) -> str:
    """How all addresses in the folder `url` begin; on a disk, behind links."""
    fs, path = filesystem(url, spec.storage_options)
    place = os.path.realpath(path) if is_local(fs) else address_of(fs, path, url)(path)
    return place.rstrip("/") + "/"
