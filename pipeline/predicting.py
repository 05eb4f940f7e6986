"""What an actor is told: the question and its placement as an `ActorJob`."""

from pipeline.opening import Question
from pipeline.placement import Placement
from pipeline.predictors.actor import ActorJob


def actor_job(question: Question, placement: Placement, rows: int = 0) -> ActorJob:
    """The job of every actor of a run that has `rows` before it."""
    spec = question.spec
    return ActorJob(
        backend=spec.backend,
        model=question.info,
        wanted=question.wanted,
        dtype=question.dtype,
        batch_size=placement.batch_size,
        threads=placement.threads,
        cuda=spec.gpus_per_actor > 0 and spec.backend == "torch",
        triton=spec.triton,
        storage_options=spec.storage_options,
        work_gflop=rows * question.image_gflop / placement.actors.max,
        block_rows=placement.block_rows,
    )
