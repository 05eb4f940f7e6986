"""Costs of one image, measured: on the first images of a source, or taken from a run that has happened."""

import statistics
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline import storage
from pipeline.images.fetch import fetch_rows
from pipeline.images.stage import Reading, fetch_and_decode
from pipeline.models.cost import forward_flop
from pipeline.opening import resolve_job
from pipeline.planning import Costs, Device, row_bytes
from pipeline.record import require_record
from pipeline.sinks.attempts import read_attempts
from pipeline.sinks.parts import list_parts
from pipeline.sources.columns import concatenated
from pipeline.sources.manifest import part_named, read_columns, read_sources
from schemas.attempt import AttemptRecord
from schemas.errors import OutputError, SourceError
from schemas.spec import VECTOR_NAMES, JobSpec
from schemas.tables import FeatureSize

LISTED = 1000
DECODED = 64
# Rows next to each other travel in one read where they lie in one tar shard, so a sample is taken in stretches.
STRETCH = 8
# Where nothing gives a size: the mean of ImageNet's files.
TYPICAL_FILE_BYTES = 110_000.0


class Sample(NamedTuple):
    """Costs, and on what they rest."""

    costs: Costs
    model: str
    origin: str


def sample_rows(spec: JobSpec, count: int) -> tuple[pa.Table, pa.Table]:
    """About `count` manifest rows in stretches over the first LISTED of the sources, and all that were listed.

    Raises SourceError when nothing matches.
    """
    limit = min(spec.limit or LISTED, LISTED)
    listed = concatenated(list(read_sources(spec.model_copy(update={"limit": limit}))))
    listed = listed.add_column(0, "row", pa.array(range(listed.num_rows), pa.int64()))
    return listed.take(pa.array(stretches(listed.num_rows, count, STRETCH))), listed


def stretches(rows: int, count: int, length: int) -> list[int]:
    """About `count` of the numbers below `rows`: runs of `length` neighbours, evenly spread."""
    if rows <= count:
        return list(range(rows))
    runs = max(1, count // length)
    starts = [int(i * (rows - length) / max(1, runs - 1)) for i in range(runs)]
    return sorted({start + step for start in starts for step in range(length)})


def from_source(spec: JobSpec) -> Sample:
    """Costs of `spec` by listing up to LISTED images of its sources and decoding DECODED of them on one core here.

    Raises SourceError when none of them can be decoded, and what `resolve_job` raises for the model.
    """
    resolved = resolve_job(spec)
    if resolved.info is None:
        raise SourceError("a plan needs a model: --backend null computes nothing")
    chosen, listed = sample_rows(spec, DECODED)
    reading = Reading.of(spec, resolved.info.preprocessing)
    # Once for what the first image loads, then for the clock; CPU time, so that a busy machine does not count double.
    list(fetch_and_decode(chosen.slice(0, 2), reading, batch_rows=DECODED))
    started = time.process_time()
    rows = pa.concat_tables(fetch_and_decode(chosen, reading, batch_rows=DECODED))
    decode_s = (time.process_time() - started) / rows.num_rows
    if rows["pixels"].null_count == rows.num_rows:
        raise SourceError(f"none of {rows.num_rows} sampled images could be decoded: {rows['message'][0].as_py()}")
    file_bytes = _file_bytes(listed) or _fetched_bytes(chosen, spec) or TYPICAL_FILE_BYTES
    uri_bytes = statistics.fmean(len(uri) for uri in listed["uri"].to_pylist())
    costs = Costs(
        file_bytes=file_bytes,
        decode_s=decode_s,
        pixel_bytes=resolved.pixel_bytes,
        output_bytes=row_bytes(
            resolved.output_bytes,
            labels=resolved.wanted.labels,
            uri_bytes=uri_bytes,
        ),
        model_flop=forward_flop(resolved.info.network, resolved.info.image_size),
        uri_bytes=uri_bytes,
        search_bytes=_search_bytes(resolved.wanted.widths, spec.feature_dtype),
        model_bytes=resolved.model_bytes,
    )
    origin = f"{listed.num_rows:,} images listed, {rows.num_rows} of them fetched and decoded here"
    return Sample(costs, resolved.info.name, origin)


def from_run(out: str, storage_options: dict[str, Any]) -> tuple[Sample, Device]:
    """Costs of the run in `out`, from its finished attempts and the size of its parts, and what ran the model: where
    several kinds of device did, that of most images.

    Raises OutputError where no attempt has recorded what it took.
    """
    record = require_record(out, storage_options)
    attempts = [a for a in read_attempts(out, storage_options) if a.images and a.stage_seconds.predict > 0]
    if not attempts:
        raise OutputError(f"{out}: no attempt there has finished an image; plan from SOURCE and --model instead")
    attempts = _of_one_device(attempts)
    images = sum(attempt.images for attempt in attempts)
    parts = [part for part in list_parts(*storage.filesystem(out, storage_options)) if part.folder == "images"]
    first = [part_named(record.manifest_parts[0])]
    manifest = pa.Table.from_batches([next(read_columns(out, first, ["uri", "length", "size"], storage_options))])
    device, predict_s = _measured(attempts)
    file_bytes = _file_bytes(manifest)
    height, width = record.model.preprocessing.output_size
    written = sum(part.size for part in parts) / max(1, sum(part.rows for part in parts))
    costs = Costs(
        file_bytes=file_bytes or TYPICAL_FILE_BYTES,
        decode_s=sum(attempt.stage_seconds.decode for attempt in attempts) / images,
        pixel_bytes=height * width * 3,
        output_bytes=written,
        model_flop=0.0,
        predict_s=predict_s,
        uri_bytes=statistics.fmean(len(uri) for uri in manifest["uri"].to_pylist()),
        search_bytes=_search_bytes(record.feature_dims, record.spec["feature_dtype"]),
    )
    origin = f"{len(attempts)} attempt{'s' * (len(attempts) > 1)} of {storage.redact(out)}, {images:,} images"
    if file_bytes is None:
        origin += "; its listing gave no sizes of files, so a usual one is assumed"
    return Sample(costs, record.model.name, origin), device


def _of_one_device(attempts: list[AttemptRecord]) -> list[AttemptRecord]:
    """Those of the device that most images were computed on: a rate of two kinds together is that of neither."""
    images = Counter[str | None]()
    for attempt in attempts:
        images[attempt.device] += attempt.images
    ((most, _),) = images.most_common(1)
    return [attempt for attempt in attempts if attempt.device == most]


def _measured(attempts: list[AttemptRecord]) -> tuple[Device, float]:
    """What ran the model in `attempts` of one device, and its seconds for an image: an actor's, or a core's with
    decoding, which shares the cores.

    On CPUs the stages' own seconds count up to twice, because each also waits for cores that the other has. They do
    where no attempt ran for long enough to have a rate: that of a shorter one is mostly start-up; and where none ran
    on a known number of cores.
    """
    if attempts[0].device != "cpu":
        seconds = sum(attempt.stage_seconds.predict for attempt in attempts)
        name = "a client of one Triton server that all share," if attempts[0].device == "triton" else "an actor"
        return Device(f"{name} as in that run", 0.0), seconds / sum(attempt.images for attempt in attempts)
    device = Device("a core as in that run", 0.0, is_gpu=False)
    ran = [attempt for attempt in attempts if attempt.has_rate]
    rates = [(a.images, a.decode_tasks / a.images_per_s) for a in ran if a.decode_tasks and a.images_per_s]
    if rates:
        return device, sum(images * core_s for images, core_s in rates) / sum(images for images, _ in rates)
    seconds = sum(attempt.stage_seconds.decode + attempt.stage_seconds.predict for attempt in attempts)
    return device, seconds / sum(attempt.images for attempt in attempts)


def _search_bytes(sizes: Mapping[str, FeatureSize], dtype: str) -> int:
    """Bytes of an image in the matrix that `search` reads: its first vector, its id and its length; 0 without one."""
    width = next((size for name in VECTOR_NAMES if isinstance(size := sizes.get(name), int)), 0)
    return width * (2 if dtype == "float16" else 4) + 12 if width else 0


def _file_bytes(manifest: pa.Table) -> float | None:
    """Mean bytes of an image as listed: of its member in a shard, else of its file. None where nothing tells."""
    columns = [manifest[name].to_pylist() for name in ("length", "size") if name in manifest.column_names]
    known = [next((value for value in row if value is not None), None) for row in zip(*columns, strict=True)]
    sizes = [size for size in known if size is not None]
    return statistics.fmean(sizes) if sizes else None


def _fetched_bytes(rows: pa.Table, spec: JobSpec) -> float | None:
    """Mean bytes of the images in `rows`, by fetching them; None where none of them can be."""
    fetched = fetch_rows(rows, fetch=spec.fetch, image_column=spec.image_column, storage_options=spec.storage_options)
    sizes = [len(one.result) for one in fetched if isinstance(one.result, bytes)]
    return statistics.fmean(sizes) if sizes else None
