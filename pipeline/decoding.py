"""The decoding task: ranges of manifest rows in, decoded tables out. It runs in Ray's workers."""

import os
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import logs, metrics
from pipeline.addresses import join
from pipeline.images.guard import CrashGuard, forget
from pipeline.images.limits import steady_memory
from pipeline.images.stage import Reading, fetch_and_decode
from pipeline.predictors.null import no_pixels
from pipeline.sinks.intervals import Spans
from pipeline.sources.manifest import ManifestPart, read_rows
from pipeline.storage import filesystem, is_local
from schemas.errors import ClusterError
from schemas.machines import SHARE
from schemas.release import Release, check_release


class DecodeJob(NamedTuple):
    """All that a decoding task needs besides the ranges of rows."""

    out: str
    parts: list[ManifestPart]
    reading: Reading
    block_rows: int
    run_id: str
    driver: Release
    null: bool


def cut(rest: Spans, sizes: Iterable[int]) -> Iterator[pa.Table]:
    """Ranges of pending rows as one small table for each decoding task, of so many rows each."""
    before = np.concatenate([[0], np.cumsum(rest[:, 1] - rest[:, 0])])
    for low, high in pairwise(accumulate(sizes, initial=0)):
        high = min(high, int(before[-1]))
        index = np.arange(np.searchsorted(before, low, "right") - 1, np.searchsorted(before, high, "left"))
        starts = np.maximum(rest[index, 0], rest[index, 0] + low - before[index])
        stops = np.minimum(rest[index, 1], rest[index, 0] + high - before[index])
        yield pa.table({"start": starts, "stop": stops})


def decode_rows(ranges: pa.Table, job: DecodeJob) -> Iterator[pa.Table]:
    """`decoded_tables` in a process that only decodes."""
    if not job.null:
        steady_memory()
    yield from decoded_tables(ranges, job)


def decoded_tables(ranges: pa.Table, job: DecodeJob) -> Iterator[pa.Table]:
    """Decoded tables for `ranges`, a table of `start` and `stop` rows."""
    check_release(job.driver)
    _check_shared(job)
    spans = np.stack([ranges["start"].to_numpy(), ranges["stop"].to_numpy()], axis=1)
    logs.working_on(job.run_id, "decode", spans[0, 0], spans[-1, 1] - 1)
    manifest = pa.concat_tables(read_rows(job.out, job.parts, spans, job.reading.storage_options))
    if job.null:
        yield from no_pixels(manifest, job.block_rows)
        return
    with closing(_guard(job.run_id)) as guard:
        yield from fetch_and_decode(
            manifest,
            job.reading,
            batch_rows=job.block_rows,
            guard=guard,
            fetched_bytes=partial(metrics.count, "patchstream_bytes_total"),
        )
    logs.event("decoded", rows=manifest.num_rows)


def _check_shared(job: DecodeJob) -> None:
    """Machines that are there when the job begins are asked before; one that joins later has to see a local output."""
    fs, path = filesystem(job.out, job.reading.storage_options)
    host = socket.gethostname()
    if is_local(fs) and host != job.driver.host and not os.path.exists(join(path, "manifest", job.parts[-1].name)):
        raise ClusterError(f"{host} does not see {path}, the output of the job, which {job.driver.host} sees. {SHARE}")


def _guard(run_id: str) -> CrashGuard:
    folder = _notes_folder(run_id)
    try:
        return CrashGuard(folder)
    except OSError as error:
        raise ClusterError(
            f"{socket.gethostname()}: no file can be put into {folder} ({error.strerror}), by which a decoder that "
            "crashes is found; make room there, or name another folder for temporary files with TMPDIR"
        ) from None


def forget_crashes(run_id: str) -> None:
    """Once a run is complete: drop what this machine remembers of workers that died on a picture."""
    forget(_notes_folder(run_id))


def _notes_folder(run_id: str) -> Path:
    return Path(tempfile.gettempdir()) / f"patchstream-{run_id}"
