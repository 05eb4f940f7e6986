"""One function in a Ray worker with given resources: what has to be measured where the work will be done."""

from collections.abc import Callable
from typing import Any

import ray

from schemas.losses import unwrap

_AFTER_A_LOSS = (
    "Nothing is lost; give the same command again. Should it happen again: workers that are killed mostly lack memory, "
    "so take a smaller --batch-size or larger machines; --verbose shows where it happened"
)


def call(function: Callable[..., Any], *, cpus: float = 1.0, gpus: float = 0.0, **arguments: Any) -> Any:
    """What `function(**arguments)` gives in a worker that has `cpus` and `gpus`. Its PatchstreamErrors come through;
    raises ClusterError where Ray loses the worker."""
    try:
        return ray.get(ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(function).remote(**arguments))
    except ray.exceptions.RayError as error:
        found = unwrap(error, _AFTER_A_LOSS)
        if found is error:
            raise
        raise found from error
