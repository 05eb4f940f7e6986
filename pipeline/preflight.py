"""What each stage of a job costs here, measured apart on a few images of the source: the numbers behind `advice.py`.

Runs in one process on the machine that it describes. CPU time counts where a core is what is spent, so that a busy
machine does not count double; wall time where something is waited for.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.advice import Forward, Measured
from pipeline.distance import cosines, vectors_only
from pipeline.images.decode import DecodeMode, DecodeSpec, decode_into
from pipeline.images.fetch import Fetched, fetch_rows
from pipeline.images.formats import prepare_process
from pipeline.images.stage import Reading, fetch_and_decode
from pipeline.models import choose_dtype
from pipeline.opening import ResolvedJob
from pipeline.placement import Placement
from pipeline.predicting import actor_job
from pipeline.predictors.actor import ActorJob, build_predictor
from pipeline.sampling import sample_rows
from pipeline.sinks.parts import split, write_part
from pipeline.storage import filesystem
from schemas.errors import ImageError, PatchstreamError, SourceError, SpecError
from schemas.spec import DTypeName
from schemas.tables import decoded_schema, images_schema, user_fields

SAMPLED = 48
DECODE_S = 5.0
FORWARD_S = 3.0
CPU_BATCHES = (1, 4, 16)
GPU_BATCHES = (64, 128, 512)
GPU_CALLS = 4
Pixels = npt.NDArray[np.uint8]


class Budget:
    """Seconds that a group of measurements may take, so that a slow model does not make a preflight of an hour."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    @property
    def spent(self) -> bool:
        return time.monotonic() > self._until


def measure(resolved: ResolvedJob, placement: Placement, *, seconds: float = 20.0) -> Measured:
    """Every stage alone, in the order in which an image meets them; about `seconds` in all.

    Raises SourceError when none of the sampled images can be decoded.
    """
    info = resolved.info
    if info is None:
        raise SourceError("a benchmark needs a model: --backend null computes nothing")
    prepare_process()
    chosen, listed = sample_rows(resolved.spec, SAMPLED)
    fetched, fetch_s, fetch_core_s = measure_fetch(resolved, chosen)
    files = [item.result for item in fetched if isinstance(item.result, bytes)]
    decode_s, pixels, undecoded = measure_decode(resolved, files)
    if not len(pixels["exact"]):
        raise SourceError(f"none of {len(fetched)} sampled images could be read and decoded: {_why(fetched)}")
    decoded = _decoded(resolved, chosen)
    forward, outputs, predict = measure_forward(resolved, placement, pixels, Budget(seconds - DECODE_S))
    return Measured(
        sampled=chosen.num_rows,
        listed=listed.num_rows,
        failed=len(fetched) - len(files) + undecoded,
        file_bytes=float(np.mean([len(data) for data in files])),
        fetch_s=fetch_s,
        fetch_core_s=fetch_core_s,
        decode_core_s={str(mode): cost for mode, cost in decode_s.items()},
        fast_cosines=cosines(outputs["fast"], outputs["exact"]).tolist() if "fast" in outputs else [],
        transfer_core_s=measure_transfer(decoded),
        forward=forward,
        write_s=measure_write(resolved, predict(decoded)),
    )


def measure_fetch(resolved: ResolvedJob, chosen: pa.Table) -> tuple[list[Fetched], float, float]:
    """What was fetched; wall seconds and core-seconds for one image, connections being open."""
    spec = resolved.spec

    def fetch(rows: pa.Table) -> list[Fetched]:
        found = fetch_rows(rows, fetch=spec.fetch, image_column=spec.image_column, storage_options=spec.storage_options)
        return list(found)

    fetch(chosen.slice(0, 2))
    started, cpu = time.perf_counter(), time.process_time()
    fetched = fetch(chosen)
    count = max(1, len(fetched))
    return fetched, (time.perf_counter() - started) / count, (time.process_time() - cpu) / count


def measure_decode(
    resolved: ResolvedJob, files: Sequence[bytes]
) -> tuple[dict[DecodeMode, float], dict[str, Pixels], int]:
    """Core-seconds for one image, its digest included, and the pixels of the files that could be decoded, for each way;
    how many could not.

    Files that are left when the time is up count as neither.
    """
    height, width = resolved.preprocessing.output_size
    modes: tuple[DecodeMode, ...] = ("exact", "fast")
    seconds: dict[DecodeMode, float] = dict.fromkeys(modes, 0.0)
    pixels: dict[str, list[Pixels]] = {mode: [] for mode in modes}
    specs = {mode: DecodeSpec(resolved.preprocessing, mode, resolved.spec.fetch.max_pixels) for mode in modes}
    _open_libraries(files, specs["exact"])
    budget, failed = Budget(DECODE_S), 0
    for data in files:
        out = {mode: np.empty((height, width, 3), np.uint8) for mode in modes}
        try:
            for mode in modes:
                started = time.thread_time()
                decode_into(data, out[mode], specs[mode])
                hashlib.sha256(data).hexdigest()  # a decoding task takes it as well, of large files for milliseconds
                seconds[mode] += time.thread_time() - started
        except ImageError:
            failed += 1
            continue
        for mode in modes:
            pixels[mode].append(out[mode])
        if budget.spent:
            break
    count = max(1, len(pixels["exact"]))
    shape = (-1, height, width, 3)
    stacked = {mode: np.concatenate(kept or [np.empty(0, np.uint8)]).reshape(shape) for mode, kept in pixels.items()}
    return {mode: total / count for mode, total in seconds.items()}, stacked, failed


def _open_libraries(files: Sequence[bytes], spec: DecodeSpec) -> None:
    """The first picture pays for what the decoders load."""
    height, width = spec.preprocessing.output_size
    with suppress(ImageError):
        for data in files[:1]:
            decode_into(data, np.empty((height, width, 3), np.uint8), spec)


def measure_transfer(decoded: pa.Table) -> float:
    """Core-seconds to hand one decoded image over through shared memory, as a block in Ray's object store goes."""
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
    rows: int
    with tempfile.NamedTemporaryFile(dir=folder, prefix="patchstream-") as file:
        started = time.process_time()
        with pa.OSFile(file.name, "wb") as sink, pa.ipc.new_stream(sink, decoded.schema) as writer:
            writer.write_table(decoded)
        with pa.memory_map(file.name) as source:
            rows = len(pa.ipc.open_stream(source).read_all())
    return (time.process_time() - started) / max(1, rows)


def measure_forward(
    resolved: ResolvedJob, placement: Placement, pixels: Mapping[str, Pixels], budget: Budget
) -> tuple[list[Forward], dict[str, npt.NDArray[np.floating[Any]]], Callable[[pa.Table], pa.Table]]:
    """The model at the placement's batch size and precision first, then at others while the budget lasts.

    Also gives the sample's vectors for the pixels of each way to decode, and the predictor itself. A precision that the
    model does not run in is left out, and so is a batch size that the device has no memory for.
    """
    cuda = resolved.spec.gpus_per_actor > 0
    job = actor_job(resolved, placement)
    predictor: Any = build_predictor(job)
    found = [timed_forward(predictor, job, pixels["exact"])]
    outputs = {"exact": vectors(predictor, job, pixels["exact"])}
    if (pixels["fast"] != pixels["exact"]).any():
        outputs["fast"] = vectors(predictor, job, pixels["fast"])
    for size in GPU_BATCHES if cuda else CPU_BATCHES:
        if size != placement.batch_size and not budget.spent:
            # As a job with it would have them: no more of its batches than now, nor images.
            batches = min(placement.block_rows // placement.batch_size, placement.block_rows // size)
            block_rows = max(1, batches) * size
            other = job._replace(batch_size=size, block_rows=block_rows)
            with suppress(PatchstreamError, RuntimeError):
                found.append(timed_forward(build_predictor(other), other, pixels["exact"]))
    for dtype in other_precisions(resolved.dtype, cuda=cuda):
        if not budget.spent:
            other = job._replace(dtype=dtype)
            with suppress(PatchstreamError, RuntimeError):
                candidate: Any = build_predictor(other)
                result = timed_forward(candidate, other, pixels["exact"])
                likeness = cosines(vectors(candidate, other, pixels["exact"]), outputs["exact"]).tolist()
                found.append(result._replace(cosines=likeness))
    return found, outputs, predictor


def other_precisions(dtype: str, *, cuda: bool) -> tuple[str, ...]:
    """What else might be worth it here, likeliest first."""
    candidates: tuple[DTypeName, ...] = ("bfloat16", "float8") if cuda else ("bfloat16", "float32", "int8")
    return tuple(name for name in candidates if name != dtype and possible(name, cuda=cuda))


def possible(dtype: DTypeName, *, cuda: bool) -> bool:
    """Whether this machine would compute in `dtype` if it were told to be fast."""
    if dtype in ("bfloat16", "float32") and not cuda:  # whichever the CPU has units for is the faster one
        return choose_dtype("auto", cuda=False) == dtype
    try:
        choose_dtype(dtype, cuda=cuda)
    except SpecError:
        return False
    return True


def timed_forward(predictor: Any, job: ActorJob, pixels: Pixels) -> Forward:
    """Median seconds of full batches, divided by their images; at least two batches, for up to FORWARD_S.

    A batch before them does not count: the first one lays out the weights. On a GPU it is a block of several batches
    at a time, and the next handed over while one computes, as in a job: copies hide behind computing.
    """
    images, calls = (max(job.batch_size, job.block_rows), GPU_CALLS) if job.cuda else (job.batch_size, 1)
    batch = np.resize(pixels, (images, *pixels.shape[1:]))
    predictor.predict(batch)
    seconds: list[float] = []
    with ThreadPoolExecutor(2) as threads:
        run = threads.map if job.cuda else map
        while len(seconds) < 2 or (sum(seconds) < FORWARD_S and len(seconds) < 50):
            started = time.perf_counter()
            list(run(predictor.predict, [batch] * calls))
            seconds.append(time.perf_counter() - started)
    image_s = float(np.median(seconds)) / (images * calls)
    # On a GPU it may have taken a smaller batch than it was asked for.
    return Forward(job.dtype, getattr(predictor, "batch_size", job.batch_size), job.threads, image_s, [])


def vectors(predictor: Any, job: ActorJob, pixels: Pixels) -> npt.NDArray[np.floating[Any]]:
    """What cosines are taken of, (n, …): the first feature asked for, or `pooled` where only labels or tokens are."""
    name = next((name for name in job.wanted.features if name != "visual_tokens"), "pooled")
    if name not in job.wanted.features:
        assert job.model is not None
        predictor = build_predictor(job._replace(wanted=vectors_only(job.model, job.wanted)))
    found: npt.NDArray[np.floating[Any]] = predictor.predict(pixels).features[name]
    return found


def measure_write(resolved: ResolvedJob, predicted: pa.Table) -> float:
    """Seconds to sort, encode and store one row in a temporary folder; the upload to a store is not in it."""
    schema = images_schema(resolved.wanted.fields, user_fields(predicted.schema))
    # A part holds many times the sample; a small one would count what a file costs whatever is in it.
    many = pa.concat_tables([predicted] * 16)
    # Patch features of that many rows may be gigabytes, several times over while they are sorted and encoded.
    many = many.slice(0, max(1, len(many) * resolved.spec.sink.part_bytes // max(1, many.nbytes)))
    # A part holds each row once.
    many = many.set_column(many.column_names.index("row"), "row", pa.array(range(len(many)), pa.int64()))
    with tempfile.TemporaryDirectory() as folder:
        fs, path = filesystem(folder, {})
        started = time.perf_counter()
        images, _ = split(many, schema)
        write_part(fs, path, "images", images, b"{}")
        return (time.perf_counter() - started) / len(many)


def _decoded(resolved: ResolvedJob, chosen: pa.Table) -> pa.Table:
    reading = Reading.of(resolved.spec, resolved.preprocessing)
    tables = list(fetch_and_decode(chosen, reading, batch_rows=SAMPLED))
    return pa.concat_tables(tables) if tables else decoded_schema(user_fields(chosen.schema)).empty_table()


def _why(fetched: Sequence[Fetched]) -> str:
    for item in fetched:
        if isinstance(item.result, ImageError):
            return item.result.message
    return "no file among them is an image"
