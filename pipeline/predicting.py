"""Where a job computes: its placement on the cluster, and what each actor is told."""

import logging

from pipeline.models.precision import misfit
from pipeline.opening import ResolvedJob
from pipeline.placement import Placement, place
from pipeline.predictors.actor import ActorJob
from schemas.machines import Machines

log = logging.getLogger(__name__)


def place_job(resolved: ResolvedJob, machines: Machines, rows: int) -> Placement:
    """Placement of a job of `rows` pending rows. Raises ClusterError when the GPUs asked for are not there."""
    spec = resolved.spec
    on_cpus = spec.backend == "torch" and not spec.gpus_per_actor
    if on_cpus and (warning := misfit(spec.dtype, resolved.dtype, machines.node_cpu_flags)):
        log.warning("%s", warning)
    if on_cpus and machines.gpus:
        log.warning("the model runs on CPUs; of the %g GPUs here none was asked for: --gpus-per-actor 1", machines.gpus)
    return placement_of(resolved, machines, rows)


def placement_of(resolved: ResolvedJob, machines: Machines, rows: int) -> Placement:
    """The same without those warnings, for who asks again."""
    spec = resolved.spec
    batch_size = None if spec.batch_size == "auto" else min(spec.batch_size, resolved.served_batch or spec.batch_size)
    return place(
        machines,
        rows=rows,
        actors=spec.actors,
        gpus_per_actor=spec.gpus_per_actor,
        batch_size=batch_size,
        pixel_bytes=resolved.pixel_bytes,
        model_bytes=resolved.model_bytes,
        image_gflop=resolved.image_gflop,
        output_bytes=resolved.output_bytes,
        # Its requests in flight are several as it is.
        one_call=spec.triton is not None,
        served_batch=resolved.served_batch,
        in_flight=spec.triton.in_flight if spec.triton and not spec.gpus_per_actor else 1,
    )


def actor_job(resolved: ResolvedJob, placement: Placement, rows: int = 0) -> ActorJob:
    """The job of every actor of a run that has `rows` before it."""
    spec = resolved.spec
    return ActorJob(
        backend=spec.backend,
        model=resolved.info,
        wanted=resolved.wanted,
        dtype=resolved.dtype,
        batch_size=placement.batch_size,
        threads=placement.threads,
        cuda=spec.gpus_per_actor > 0 and spec.backend == "torch",
        triton=spec.triton,
        storage_options=spec.storage_options,
        work_gflop=rows * resolved.image_gflop / placement.actors.max,
        block_rows=placement.block_rows,
    )
