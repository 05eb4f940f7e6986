"""The Ray actor around a predictor: made once, then called block by block."""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import logs, metrics
from pipeline.models import ModelInfo
from pipeline.predictors.batches import Wanted
from schemas.errors import PatchstreamError
from schemas.release import Release, check_release
from schemas.spec import TritonSpec

Predictor = Callable[[pa.Table], pa.Table]


class ActorJob(NamedTuple):
    """Everything an actor needs to build its predictor. `dtype` is resolved, never `auto`.

    `threads`: of one call, of which there may be several at once. `work_gflop`: about what one actor has before it, in
    billions of operations. `block_rows`: the most images that a call brings, 0 where that is not known."""

    backend: str
    model: ModelInfo | None
    wanted: Wanted
    dtype: str
    batch_size: int
    threads: int
    cuda: bool
    triton: TritonSpec | None
    storage_options: dict[str, Any]
    work_gflop: float = 0.0
    block_rows: int = 0


class PredictActor:
    """Callable class for `Dataset.map_batches`. What keeps it from working is raised by its first call."""

    def __init__(self, job: ActorJob, driver: Release, run_id: str) -> None:
        if job.threads:
            os.environ["OMP_NUM_THREADS"] = str(job.threads)
        self._job, self._run_id = job, run_id
        logs.working_on(run_id, "predict")
        started = time.perf_counter()
        try:
            check_release(driver)
            self._predict = build_predictor(job)
        except PatchstreamError as error:
            # Of what an actor raises as it is made, Ray hands on the text alone.
            self._predict = _refusing(error)
            return
        logs.event("ready", backend=job.backend, dtype=job.dtype, seconds=time.perf_counter() - started)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Predicted table for a decoded one."""
        rows = pc.min_max(decoded["row"]).as_py()
        logs.working_on(self._run_id, "predict", rows["min"], rows["max"])
        pictures = decoded.num_rows - decoded["pixels"].null_count
        if pictures:
            batch = getattr(self._predict, "batch_size", self._job.batch_size)  # on a GPU it may choose a smaller one
            metrics.show("patchstream_batch_fill", pictures / (-(-pictures // batch) * batch))
        return self._predict(decoded)

    def __del__(self) -> None:
        """Let go of what others hold for the predictor. Ray Data deletes this when it is done with the actor."""
        if close := getattr(getattr(self, "_predict", None), "close", None):
            close()


def _refusing(error: PatchstreamError) -> Predictor:
    def refuse(decoded: pa.Table) -> pa.Table:
        raise error

    return refuse


def build_predictor(job: ActorJob) -> Predictor:
    """The predictor that `job.backend` names, with its model loaded."""
    if job.backend == "null":
        from pipeline.predictors.null import NullPredictor

        return NullPredictor(job.wanted)
    if job.model is None:
        raise ValueError(f"backend {job.backend} needs a model")
    if job.backend == "triton":
        from pipeline.predictors.triton import TritonPredictor

        if job.triton is None:
            raise ValueError("backend triton needs the address of a server")
        return TritonPredictor(job.model, job.wanted, job.dtype, job.triton, job.batch_size)
    from pipeline.predictors.torch_predictor import TorchPredictor

    return TorchPredictor(
        job.model,
        job.wanted,
        dtype=job.dtype,
        batch_size=job.batch_size,
        threads=job.threads,
        cuda=job.cuda,
        work_gflop=job.work_gflop,
        call_rows=job.block_rows,
        storage_options=job.storage_options,
    )
