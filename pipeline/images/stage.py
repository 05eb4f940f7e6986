"""The first stage: manifest rows in, uint8 pixels or the reason why there are none out."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import pyarrow as pa

from pipeline.images.batch import MAX_PIXEL_BYTES, BatchBuilder
from pipeline.images.decode import DecodeMode, DecodeSpec, ImageFacts, decode_into
from pipeline.images.failures import bare
from pipeline.images.fetch import Fetched, fetch_rows
from pipeline.images.formats import prepare_process
from pipeline.images.guard import CrashGuard
from pipeline.images.isolated import decode_isolated
from pipeline.images.transform import Pixels
from schemas.errors import ImageError
from schemas.preprocessing import Preprocessing
from schemas.spec import FetchSpec, JobSpec


class Reading(NamedTuple):
    """How images come in: what the model wants of them, how they are fetched and decoded, the column of tables that
    holds them, and the options of the stores."""

    preprocessing: Preprocessing
    fetch: FetchSpec = FetchSpec()
    decode: DecodeMode = "exact"
    image_column: str = "image"
    storage_options: Mapping[str, Any] = {}

    @classmethod
    def of(cls, spec: JobSpec, preprocessing: Preprocessing) -> Self:
        """As the job reads them."""
        return cls(preprocessing, spec.fetch, spec.decode, spec.image_column, spec.storage_options)


def fetch_and_decode(
    manifest: pa.Table,
    reading: Reading,
    *,
    batch_rows: int,
    guard: CrashGuard | None = None,
    fetched_bytes: Callable[[int], None] = lambda count: None,
) -> Iterator[pa.Table]:
    """Tables of `decoded_schema` with at most `batch_rows` rows, every manifest row once and in order.

    Later files are fetched while earlier ones are decoded in the calling thread. With a `guard`, an image that
    kills the process costs its worker once and becomes a failure row afterwards. `fetched_bytes` is told how many bytes
    of files arrived, batch by batch.
    """
    prepare_process()
    height, width = reading.preprocessing.output_size
    batch_rows = max(1, min(batch_rows, MAX_PIXEL_BYTES // (height * width * 3)))
    spec = DecodeSpec(reading.preprocessing, reading.decode, reading.fetch.max_pixels)
    fetched = fetch_rows(
        manifest, fetch=reading.fetch, image_column=reading.image_column, storage_options=reading.storage_options
    )
    for start in range(0, manifest.num_rows, batch_rows):
        rows = manifest.slice(start, batch_rows)
        builder = BatchBuilder(rows.num_rows, height, width)
        arrived = 0
        for row in rows.column("row").to_pylist():
            file = next(fetched)
            arrived += len(file.result) if isinstance(file.result, bytes) else 0
            _decode_row(row, file, builder, spec, guard)
        fetched_bytes(arrived)
        yield builder.table(rows)


def _decode_row(row: int, fetched: Fetched, builder: BatchBuilder, spec: DecodeSpec, guard: CrashGuard | None) -> None:
    if isinstance(fetched.result, ImageError):
        builder.add(fetched.result, None, fetched.seconds, 0.0)
        return
    started = time.perf_counter()
    result: ImageFacts | ImageError
    try:
        result = _decode(row, fetched.result, builder.slot(), spec, guard)
    except ImageError as error:
        error.attempts = max(error.attempts, fetched.attempts)
        result = bare(error)
    digest = hashlib.sha256(fetched.result).hexdigest()
    builder.add(result, digest, fetched.seconds, time.perf_counter() - started)


def _decode(row: int, data: bytes, out: Pixels, spec: DecodeSpec, guard: CrashGuard | None) -> ImageFacts:
    if guard is None:
        return decode_into(data, out, spec)
    strikes = guard.strikes(row)
    with guard.noted(row):
        if strikes == 0:
            return decode_into(data, out, spec)
        return decode_isolated(data, out, spec, strikes)
