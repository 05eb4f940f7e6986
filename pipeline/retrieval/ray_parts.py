"""Work on the parts of a run by Ray tasks: each streams one part, so that no machine holds all vectors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from fsspec import AbstractFileSystem

from pipeline.retrieval.arrays import Floats, Ints, Preparation, directed, lengths
from pipeline.retrieval.parts import Part, stream_part
from schemas.losses import unwrap

_BATCH_ROWS = 8192
_TASKS_A_CORE = 2
_AFTER_A_LOSS = (
    "What was there before stays; the same command begins anew. Should it happen again: workers that are killed mostly "
    "lack memory, so take machines with more of it for each core; PATCHSTREAM_VERBOSE=1 in the environment shows where "
    "it happened"
)


@dataclass(frozen=True)
class PartReader:
    """What a task needs to read parts: prepared, usable vectors of feature `name`."""

    fs: AbstractFileSystem
    name: str
    dim: int
    prepare: Preparation
    replaced: Ints

    def batches(self, part: Part) -> Iterator[tuple[Ints, Floats]]:
        """Row ids (n,) and prepared vectors (n, D) float32 of a part."""
        for rows, raw in stream_part(self.fs, part, self.name, self.dim, _BATCH_ROWS):
            vectors = raw.astype(np.float32, copy=False)
            usable = directed(lengths(vectors)) & ~np.isin(rows, self.replaced)
            yield rows[usable], self.prepare.apply(vectors[usable])


def over_parts(task: Callable[..., Any], parts: Sequence[Part], *shared: Any) -> Iterator[tuple[Part, Any]]:
    """Run `task(part, *shared)` for each part on the cluster; yields results as they come.

    `shared` is sent once. Only a few results wait at a time, so a slow reader holds the tasks back. Ray has to be
    connected; an error of a task is raised here as it was raised there. Raises ClusterError where Ray loses a task for
    good.
    """
    remote = ray.remote(num_cpus=1, max_retries=2)(_single_threaded)
    handles = [ray.put(value) for value in shared]
    most = max(1, _TASKS_A_CORE * int(ray.cluster_resources().get("CPU", 1)))
    waiting = list(parts)
    running: dict[Any, Part] = {}
    try:
        while waiting or running:
            while waiting and len(running) < most:
                part = waiting.pop(0)
                running[remote.remote(task, part, *handles)] = part
            ready, _ = ray.wait(list(running), num_returns=1)
            part = running.pop(ready[0])
            try:
                result = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                found = unwrap(error, _AFTER_A_LOSS)
                cause = getattr(error, "cause", None) if found is error else found
                if cause is None:
                    raise
                raise cause from error
            yield part, result
    finally:
        for reference in running:
            ray.cancel(reference, force=False)


def _single_threaded(task: Callable[..., Any], part: Part, *shared: Any) -> Any:
    import faiss
    import torch

    # As many tasks as cores run at once; more threads would only get in each other's way.
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    return task(part, *shared)
