"""What Ray raises where it gives up on processes, nodes or room, and what the user is told of it.

By the names of the types: Ray is imported only where it runs.
"""

from schemas.errors import ClusterError, PatchstreamError
from schemas.redaction import redact

# What Ray Data appends to the message of whatever a function of ours raises.
_RAYS_NOTE = "\nFailed to apply UDF transform"
# What Ray raises where processes, nodes or room failed it more often than it tries again, not where code did.
_LOSSES = frozenset(
    {
        "LocalRayletDiedError",
        "NodeDiedError",
        "ObjectLostError",
        "ObjectStoreFullError",
        "OutOfDiskError",
        "OutOfMemoryError",
        "RayActorError",
        "RaySystemError",
        "WorkerCrashedError",
    }
)
_OF_A_JOB = (
    "What was committed stays and the same command resumes. Should it happen again: workers that are killed mostly "
    "lack memory, so take a smaller --batch-size or machines with more of it; --verbose shows where it happened"
)


def unwrap(error: BaseException, advice: str = _OF_A_JOB) -> BaseException:
    """The PatchstreamError that a worker raised, if one lies at the bottom of what Ray made of it; a ClusterError where
    Ray lost what the work ran on, which says what is left and what to do (`advice`); else `error`."""
    seen: BaseException | None = error
    loss: BaseException | None = None
    while seen is not None:
        names = {kind.__name__ for kind in type(seen).__mro__ if kind.__module__ == "ray.exceptions"}
        # What Ray makes of ours passes for ours too, with a traceback as its message.
        if isinstance(seen, PatchstreamError) and "RayError" not in names:
            seen.args = (str(seen).partition(_RAYS_NOTE)[0],)
            return seen
        # An actor that fails as it is made failed by an error of code.
        if names & _LOSSES and not getattr(seen, "actor_init_failed", False):
            loss = seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error if loss is None else _lost(loss, advice)


def _lost(loss: BaseException, advice: str) -> ClusterError:
    said = redact(str(loss).strip().partition("\n")[0])
    return ClusterError(
        "Ray gave up: a worker, node or object that the job needed was lost more often than Ray retries "
        f"({type(loss).__name__}: {said}). {advice}"
    )
