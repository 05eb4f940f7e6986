"""The Parquet parts of a run: which there are, that they belong together, and streaming one column of them."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

from pipeline.addresses import join
from pipeline.columns import open_columns
from pipeline.retrieval.arrays import Ints
from pipeline.settled import became_another, is_same_run, list_parquet, settled_listing
from pipeline.storage import is_local, redact
from schemas.errors import OutputError
from schemas.run import RunRecord, difference, part_model
from schemas.tables import METADATA_KEY, user_fields

# Path and size of a part to its schema and number of rows.
Footers = dict[tuple[str, int], tuple[pa.Schema, int]]

_READERS = 16


class NoParts(OutputError):
    """There is no part in `images/`."""


@dataclass(frozen=True)
class Part:
    """One file of `images/`. `bytes_` is its size on the store."""

    path: str
    name: str
    bytes_: int
    rows: int


def open_parquet(fs: AbstractFileSystem, path: str) -> pq.ParquetFile:
    """A reader for `path` on any store, of some of its columns. Raises OutputError if it is gone or not Parquet."""
    try:
        return pq.ParquetFile(path if is_local(fs) else open_columns(fs, path))
    except FileNotFoundError as error:
        raise OutputError(_not_there(fs, path)) from error
    except pa.ArrowInvalid as error:
        raise OutputError(f"{redact(path)} is not a Parquet file ({error}); run `patchstream verify`") from error


def _not_there(fs: AbstractFileSystem, path: str) -> str:
    shared = ". With --ray, a local folder has to be one that all nodes share" if is_local(fs) else ""
    return f"{redact(path)} is not there (any more); if the run was compacted meanwhile, run the command again{shared}"


def settled_parts(fs: AbstractFileSystem, root: str, record: RunRecord) -> tuple[list[Part], pa.Schema]:
    """The parts of `root/images`, which hold all rows, and their common schema.

    It waits while parts are being rewritten. Raises NoParts if there is none, and OutputError if that lasts, or if a
    part was computed by another model than `run.json` names.
    """
    footers: Footers = {}
    for found in settled_listing(root, fs, root, lambda: list_parquet(fs, join(root, "images"))):
        try:
            return _with_schema(fs, root, record, found, footers)
        except OutputError:
            if set(found).issubset(list_parquet(fs, join(root, "images"))):
                raise  # else a part went while footers were read
    raise AssertionError("unreachable")


def _with_schema(
    fs: AbstractFileSystem, root: str, record: RunRecord, found: list[tuple[str, int]], footers: Footers
) -> tuple[list[Part], pa.Schema]:
    """The parts `found` and their schema. What is read of them goes into `footers`, and is not read again."""

    def read(item: tuple[str, int]) -> None:
        footers[item] = _footer(fs, item[0])

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(read, [item for item in found if item not in footers]))
    schema = None
    for item in found:
        part_schema, _ = footers[item]
        _check_same_model(item[0], part_schema, record)
        schema = _same_schema(schema, part_schema, item[0])
    if schema is None:
        raise NoParts(
            f"{redact(root)}/images holds no finished part yet: let the run go on, then come back; where it is over, "
            "all images failed, and `patchstream status DIR` shows of what"
        )
    return [Part(path, path.rpartition("/")[2], size, footers[path, size][1]) for path, size in found], schema


def schema_to_be(fs: AbstractFileSystem, root: str, record: RunRecord) -> pa.Schema:
    """The schema that parts of `root/images` will have, where there are none."""
    with open_parquet(fs, join(root, "manifest", record.manifest_parts[0])) as file:
        return record.images_schema(user_fields(file.schema_arrow))


def parts_instead(
    fs: AbstractFileSystem, root: str, record: RunRecord, before: list[Part], schema: pa.Schema
) -> list[Part] | None:
    """Where some of the parts `before` are gone, those that hold their rows now; None where all are there.

    Raises OutputError where that is another run, or holds fewer rows.
    """
    if {path for path, _ in list_parquet(fs, join(root, "images"))}.issuperset(part.path for part in before):
        return None
    parts, schema_now = settled_parts(fs, root, record)
    all_there = sum(part.rows for part in parts) >= sum(part.rows for part in before)
    if is_same_run(fs, root, record.run_id) and schema_now.equals(schema) and all_there:
        return parts
    raise became_another(root)


def _footer(fs: AbstractFileSystem, path: str) -> tuple[pa.Schema, int]:
    with open_parquet(fs, path) as file:
        return file.schema_arrow, file.metadata.num_rows


def _same_schema(schema: pa.Schema | None, other: pa.Schema, path: str) -> pa.Schema:
    plain = other.remove_metadata()
    if schema is not None and not schema.equals(plain):
        raise OutputError(f"{redact(path)} has other columns than the parts before it; run `patchstream verify`")
    return plain


def _check_same_model(path: str, schema: pa.Schema, record: RunRecord) -> None:
    # A part without our metadata was rewritten by another tool; its place in the directory speaks for it.
    content = (schema.metadata or {}).get(METADATA_KEY)
    if content is None:
        return
    found = json.loads(content)
    try:
        there = part_model(found)
    except (ValueError, KeyError):
        there = found.get("model", {})
    wanted = record.model.model_dump(mode="json")
    if there.get("digest") == wanted["digest"] and there.get("preprocessing") == wanted["preprocessing"]:
        return
    lines = "\n  ".join(difference(there, wanted, "model."))
    raise OutputError(
        f"{redact(path)} was computed by another model than run.json names, and vectors of two models cannot be "
        f"compared:\n  {lines}\nMove that part to a directory of its own."
    )


def fingerprint(parts: list[Part], record: RunRecord, *more: str) -> str:
    """Hex digest that changes when a part is added, removed or replaced, and from run to run and model to model.

    The name of a part says which rows it holds, and vectors of another model take the same bytes.
    """
    content = [record.run_id, record.model.digest, *more, *(f"{part.name}:{part.bytes_}" for part in parts)]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def stream_part(
    fs: AbstractFileSystem, part: Part, name: str, dim: int, batch_rows: int
) -> Iterator[tuple[Ints, NDArray[Any]]]:
    """Row ids (n,) and vectors (n, D) of one part, in file order and as on disk. A null vector reads as NaN."""
    with open_parquet(fs, part.path) as file:
        for batch in file.iter_batches(batch_rows, columns=["row", name], use_threads=False):
            yield batch.column("row").to_numpy(), vectors_of(batch.column(name), dim)


def vectors_of(column: pa.FixedSizeListArray, dim: int) -> NDArray[Any]:
    """(n, D) of a fixed-size-list column; no copy unless it holds nulls."""
    if not column.null_count:
        return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(len(column), dim)
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    vectors = np.full((len(column), dim), np.nan, column.type.value_type.to_pandas_dtype())
    vectors[valid] = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return vectors
