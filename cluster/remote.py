"""One function in a Ray worker with given resources: what has to be measured where the work will be done."""

from collections.abc import Callable
from typing import Any

import ray

from schemas.errors import PatchstreamError


def call(function: Callable[..., Any], *, cpus: float = 1.0, gpus: float = 0.0, **arguments: Any) -> Any:
    """What `function(**arguments)` gives in a worker that has `cpus` and `gpus`. Its PatchstreamErrors come through."""
    try:
        return ray.get(ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(function).remote(**arguments))
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, PatchstreamError):
            raise cause from error
        raise
