"""Rows of a manifest to the bytes of their files, in manifest order, later files read while earlier ones decode."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.storage import filesystem, redact
from schemas.errors import ImageError
from schemas.spec import FetchSpec


@dataclass(frozen=True, slots=True)
class Fetched:
    """The bytes of one file, or why there are none."""

    result: bytes | ImageError
    seconds: float
    attempts: int


def fetch_rows(
    manifest: pa.Table, *, fetch: FetchSpec, image_column: str, storage_options: Mapping[str, Any]
) -> Iterator[Fetched]:
    """One `Fetched` for each row of `manifest`, in its order."""
    urls = manifest.column("uri").to_pylist()
    with ThreadPoolExecutor(fetch.concurrency) as pool:
        pending: deque[Future[Fetched]] = deque()
        for url in urls:
            pending.append(pool.submit(_fetch_one, url, storage_options))
            if len(pending) > 2 * fetch.concurrency:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _fetch_one(url: str, storage_options: Mapping[str, Any]) -> Fetched:
    started = time.perf_counter()
    try:
        fs, path = filesystem(url, storage_options)
        data: bytes | ImageError = fs.cat_file(path)
    except FileNotFoundError:
        data = ImageError("fetch", "NotFound", f"{redact(url)} does not exist")
    except OSError as error:
        data = ImageError("fetch", type(error).__name__, redact(str(error)), retryable=True)
    return Fetched(data, time.perf_counter() - started, 1)
