"""The first stage: manifest rows in, uint8 pixels or the reason why there are none out."""

import hashlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from pipeline.images.batch import MAX_PIXEL_BYTES, BatchBuilder
from pipeline.images.decode import DecodeMode, ImageFacts, decode_into
from pipeline.images.fetch import Fetched, fetch_rows
from pipeline.images.formats import prepare_process
from schemas.errors import ImageError
from schemas.preprocessing import Preprocessing
from schemas.spec import FetchSpec


def fetch_and_decode(
    manifest: pa.Table,
    *,
    preprocessing: Preprocessing,
    fetch: FetchSpec,
    decode: DecodeMode,
    image_column: str,
    storage_options: Mapping[str, Any],
    batch_rows: int,
) -> Iterator[pa.Table]:
    """Tables of `decoded_schema` with at most `batch_rows` rows, every manifest row once and in order.

    Later files are fetched while earlier ones are decoded in the calling thread.
    """
    prepare_process()
    height, width = preprocessing.output_size
    batch_rows = max(1, min(batch_rows, MAX_PIXEL_BYTES // (height * width * 3)))
    fetched = fetch_rows(manifest, fetch=fetch, image_column=image_column, storage_options=storage_options)
    for start in range(0, manifest.num_rows, batch_rows):
        rows = manifest.slice(start, batch_rows)
        builder = BatchBuilder(rows.num_rows, height, width)
        for _ in range(rows.num_rows):
            _decode_row(next(fetched), builder, preprocessing, decode, fetch.max_pixels)
        yield builder.table(rows)


def _decode_row(
    fetched: Fetched, builder: BatchBuilder, preprocessing: Preprocessing, mode: DecodeMode, max_pixels: int
) -> None:
    if isinstance(fetched.result, ImageError):
        builder.add(fetched.result, None, fetched.seconds, 0.0)
        return
    started = time.perf_counter()
    result: ImageFacts | ImageError
    try:
        result = decode_into(
            fetched.result, builder.slot(), preprocessing=preprocessing, mode=mode, max_pixels=max_pixels
        )
    except ImageError as error:
        error.attempts = max(1, fetched.attempts)
        result = error
    digest = hashlib.sha256(fetched.result).hexdigest()
    builder.add(result, digest, fetched.seconds, time.perf_counter() - started)
