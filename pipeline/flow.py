"""The whole job, in order:

    model ─▶ manifest ─▶ pending rows ─▶ fetch + decode ─▶ predict ─▶ commit ─▶ finish
    (read)   (frozen)    (the ledger)    (CPU tasks)       (actors)   (parts)   (compact)

Only this file composes the stages. The output is the ledger: whatever ends a run early, the same call finds out from
the visible parts what is left, and does that.
"""

from __future__ import annotations  # a mere mention of ray.data would load it

import logging
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, suppress
from importlib import import_module
from typing import Any, NamedTuple

import ray

from pipeline.addresses import absolute
from pipeline.decoding import DecodeJob, cut, decode_rows, forget_crashes
from pipeline.distance import known_distance, measure_distance, rows_to_measure, warn_if_unmeasured
from pipeline.images.stage import Reading
from pipeline.models.precision import MEASURED
from pipeline.opening import Opened, ResolvedJob, open_directory, resolve_job
from pipeline.placement import Placement
from pipeline.predicting import actor_job, place_job
from pipeline.predictors.actor import PredictActor
from pipeline.progress import Listener, Meter, Progress
from pipeline.record import warn_of_versions
from pipeline.signals import interruptible
from pipeline.sinks import attempts, intervals
from pipeline.sinks.attempts import Fence
from pipeline.sinks.compaction import FULL_FRACTION, compact, drop_repeats, recover, remove_rows
from pipeline.sinks.intervals import Spans
from pipeline.sinks.ledger import Ledger, read_ledger
from pipeline.sinks.parts import remove_abandoned
from pipeline.sinks.ray_writer import Committed, Received, WriteJob, commit_stream
from pipeline.storage import filesystem, redact
from schemas.attempt import AttemptRecord, Distance
from schemas.errors import Interrupted, OutputError
from schemas.losses import unwrap
from schemas.machines import Machines
from schemas.release import release
from schemas.spec import JobSpec

Connect = Callable[[], AbstractContextManager[Machines]]
Place = Callable[[ResolvedJob, Machines, int], Placement]

# Ray repeats lost tasks by itself. A further pass is for rows that a pass left behind all the same.
_MAX_PASSES = 3
# Ray Data cuts a block only when it exceeds its target by half, so a batch a little above the target stays whole.
_TARGET_SHARE = 0.8
# Ray keeps results below 100 KB in the driver's own memory, where they would add up until they are committed.
_LEAST_BLOCK_BYTES = 1 << 20


class Summary(NamedTuple):
    """How a run ended. Row counts are of this job's shard of the manifest, without rows that newer ones replaced."""

    out: str
    rows: int
    images: int
    failures: int
    attempt: AttemptRecord


def run(spec: JobSpec, connect: Connect, listen: Listener = lambda progress: None, place: Place = place_job) -> Summary:
    """Do what `spec` asks, or what is left of it.

    `connect` gives the Ray cluster and is entered only if rows are pending; `place` says what is done where on it.
    Raises PatchstreamError (see `schemas.errors`): what was committed before that stays, and the same call goes on from
    there.
    """
    spec = spec.model_copy(update={"out": absolute(spec.out)})
    try:
        with interruptible():
            return _run(spec, connect, listen, place)
    except (KeyboardInterrupt, Interrupted) as stopped:
        raise _resumable(stopped, spec) from None


def _run(spec: JobSpec, connect: Connect, listen: Listener, place: Place) -> Summary:
    listen(Progress("model"))
    resolved = resolve_job(spec)
    listen(Progress("listing"))
    opened = open_directory(resolved)
    fence, attempt = attempts.claim(spec.out, spec.shard, spec.storage_options, spec.task)
    try:
        recover(spec.out, spec.storage_options)
        ledger = read_ledger(spec.out, spec.storage_options)
        rest = opened.pending(ledger)
        attempt.rows_planned = intervals.count(rest)
        if attempt.rows_planned:
            warn_of_versions(opened.record, attempt.versions)
            listen(Progress("starting"))
            with connect() as machines:
                placement = place(resolved, machines, attempt.rows_planned)
                failed = opened.count(ledger.failures)
                _work(resolved, opened, machines, placement, fence, attempt, rest, failed, listen)
        listen(Progress("finishing"))
        _finish(spec, opened)
        ledger = _complete_ledger(spec, opened)
        attempt.status = "done"
    except (KeyboardInterrupt, Interrupted):
        attempt.status = "interrupted"
        raise
    except BaseException as error:
        attempt.status, attempt.message = "failed", redact(str(error))[:2000]
        raise
    finally:
        attempts.finish(spec.out, attempt, spec.storage_options)
    rows = intervals.count(opened.current)
    return Summary(spec.out, rows, opened.count(ledger.images), opened.count(ledger.failures), attempt)


def _work(
    resolved: ResolvedJob,
    opened: Opened,
    machines: Machines,
    placement: Placement,
    fence: Fence,
    attempt: AttemptRecord,
    rest: Spans,
    failed: int,
    listen: Listener,
) -> None:
    """Predict and commit `rest`, in as many passes as it takes. `failed` rows have come to their end as failures."""
    spec = resolved.spec
    rows, left = intervals.count(opened.current), intervals.count(rest)
    resources, served = _resources_now if machines.may_grow else None, spec.backend == "triton"
    meter = Meter(rows, rows - left, failed, placement, spec.fetch.concurrency, resources, served)
    attempt.device = "triton" if served else "gpu" if spec.gpus_per_actor else "cpu"
    job = WriteJob(fence, opened.schema, opened.record.part_metadata(), opened.record.run_id)

    def committed(done: Committed) -> None:
        meter.committed(done.images, done.failures, done.parts, done.seconds)

    try:
        if resolved.dtype in MEASURED:
            attempt.distance = _distance(resolved, opened, placement, rest)
            attempts.note(spec.out, attempt, spec.storage_options)  # now, for whoever goes on after a kill
        for _ in range(_MAX_PASSES):
            dataset = build(resolved, opened, placement, rest)
            with closing(commit_stream(_bundles(dataset), job, spec.sink, late=committed)) as events:
                for event in events:
                    if isinstance(event, Received):
                        meter.received(event.rows)
                    elif isinstance(event, Committed):
                        committed(event)
                    listen(meter.look())
            rest = opened.pending(read_ledger(spec.out, spec.storage_options))
            if not len(rest):
                return
    except ray.exceptions.RayError as error:
        raise unwrap(error) from error
    finally:
        meter.report(attempt)
        with suppress(OutputError):  # now, for the end of Ray may take the process with it
            attempts.note(spec.out, attempt, spec.storage_options)
    raise OutputError(
        f"{intervals.count(rest)} rows came to no end in {_MAX_PASSES} passes (the first is row {rest[0, 0]}): "
        "workers keep dying on them, most likely for want of memory. Run the same command with a smaller "
        "--batch-size, or on machines with more of it; what was committed stays"
    )


def _resources_now() -> tuple[float, float]:
    """Cores and GPUs that the cluster has now."""
    there: dict[str, float] = ray.cluster_resources()
    return there.get("CPU", 0.0), there.get("GPU", 0.0)


def _distance(resolved: ResolvedJob, opened: Opened, placement: Placement, rest: Spans) -> Distance:
    """How far this precision is from float32: as an earlier attempt found, else measured where an actor would run."""
    spec = resolved.spec
    if known := known_distance(attempts.read_attempts(spec.out, spec.storage_options), resolved.dtype):
        return known
    looks = rows_to_measure(rest)
    measure = ray.remote(num_cpus=placement.actor_cpus, num_gpus=placement.actor_gpus)(measure_distance)
    decode = _decode_job(resolved, opened, placement)
    found: Distance = ray.get(measure.remote(resolved, placement, looks, decode))
    warn_if_unmeasured(found, looks)
    return found


def _decode_job(resolved: ResolvedJob, opened: Opened, placement: Placement) -> DecodeJob:
    spec = resolved.spec
    return DecodeJob(
        out=spec.out,
        parts=opened.parts,
        reading=Reading.of(spec, resolved.preprocessing),
        block_rows=placement.block_rows,
        run_id=opened.record.run_id,
        driver=release(),
        null=resolved.info is None,
    )


def build(resolved: ResolvedJob, opened: Opened, placement: Placement, rest: Spans) -> ray.data.Dataset:
    """The Ray Data pipeline over the pending rows: one block of row ranges for each decoding task.

    Decoding and predicting book different resources (only actors book memory), because Ray Data would otherwise
    fuse them and decode serially inside the actors. Ray Data repeats a task whose worker died for ever; the crash
    guard sees to it that a picture which kills its decoder costs one repetition.
    """
    _load_ray_data()
    rows = intervals.count(rest)
    with ray.data.DataContext.current(_context(placement)):
        tasks = ray.data.from_blocks(list(cut(rest, placement.task_sizes(rows))))
    return tasks.map_batches(
        decode_rows,
        fn_kwargs={"job": _decode_job(resolved, opened, placement)},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=placement.decode_cpus,
    ).map_batches(
        PredictActor,
        fn_constructor_args=(actor_job(resolved, placement, rows), release(), opened.record.run_id),
        # Where a GPU is asked for, Ray Data wants a number: that of our blocks. A shorter one waits for the next.
        batch_size=placement.block_rows if placement.actor_gpus else None,
        batch_format="pyarrow",
        num_cpus=placement.actor_cpus,
        num_gpus=placement.actor_gpus,
        memory=placement.actor_memory_bytes,
        # In threads of their own: on CPUs each computes; on a GPU the next hands its batches over meanwhile.
        compute=ray.data.ActorPoolStrategy(
            min_size=placement.actors.min,
            max_size=placement.actors.max,
            initial_size=placement.initial_actors,
            max_concurrent_calls_per_actor=placement.actor_calls,
            enable_true_multi_threading=placement.actor_calls > 1,
        ),
    )


def _bundles(dataset: ray.data.Dataset) -> Generator[Any, None, None]:
    """Block references as they come. A generator, so that the execution starts in the thread that consumes it."""
    yield from dataset.iter_internal_ref_bundles()


def _load_ray_data() -> None:
    """Import it; only now, because that takes a second. What its logger may say is not for the import to set."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    import_module("ray.data")
    if level:
        logger.setLevel(level)


def _context(placement: Placement) -> ray.data.DataContext:
    """Settings of our dataset alone: those of the process may serve other datasets of its owner."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    context.raise_original_map_exception = True  # Ray Data's own in its place comes without its cause
    context.target_max_block_size = max(_LEAST_BLOCK_BYTES, int(placement.block_bytes * _TARGET_SHARE))
    # Machines that were taken away may be long in coming back. Progress tells how long nothing has come.
    context.execution_no_progress_timeout_s = -1
    limits = context.execution_options.resource_limits
    context.execution_options.resource_limits = limits.copy(object_store_memory=placement.stream_bytes)
    return context


def _finish(spec: JobSpec, opened: Opened) -> None:
    """Tidy up once nothing is pending: no row twice, no replaced version, no needlessly small part,
    nothing of writers that were killed."""
    ledger = read_ledger(spec.out, spec.storage_options)
    if len(ledger.twice):
        drop_repeats(spec.out, ledger.twice, spec.storage_options)
    mine = intervals.intersect(opened.replaced, opened.first, opened.stop)
    for folder in ("images", "failures") if len(mine) else ():
        remove_rows(spec.out, folder, mine, spec.storage_options)
    compact(spec.out, spec.sink.compact_bytes, spec.storage_options, opened.first, opened.stop, FULL_FRACTION)
    remove_abandoned(*filesystem(spec.out, spec.storage_options))
    forget_crashes(opened.record.run_id)


def _complete_ledger(spec: JobSpec, opened: Opened) -> Ledger:
    """What is there in the end. Raises OutputError if rows have no part after all, whoever took it."""
    for _ in range(_MAX_PASSES):
        recover(spec.out, spec.storage_options)  # waits for another shard's swap, in which rows are out of sight
        ledger = read_ledger(spec.out, spec.storage_options)
        left = opened.pending(ledger)
        if not len(left):
            return ledger
    raise OutputError(
        f"{intervals.count(left)} rows that were committed are gone again (the first is row {left[0, 0]}): somebody "
        "else removes parts there. The same command does what is missing"
    )


def _resumable(stopped: BaseException, spec: JobSpec) -> Interrupted:
    number = stopped.exit_code - 128 if isinstance(stopped, Interrupted) else 2
    return Interrupted(
        f"interrupted; what was committed stays in {redact(spec.out)}, the same command goes on from there", number
    )
