"""A command as a Ray job: handed to a cluster's dashboard, followed, stopped, asked for its exit code."""

import asyncio
import contextlib
import os
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, NamedTuple

import aiohttp
import ray
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.token import no_token
from schemas.errors import ClusterError
from schemas.machines import NEEDED_VARIABLES
from schemas.redaction import redact
from schemas.release import VERSION

# Ray kills a job 3 s after it was told to stop. Ours wants to write what it holds, for at most 15 s.
_STOP_WAIT_S = 30
_LOST_S = 120.0
_AGAIN_S = 2.0
# A connection whose other end went away without a word looks like that of a job that has nothing to say.
_SILENT_S = 60.0
# Where set, Ray's client goes there and not to the address that it is given.
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_REFUSED = (ConnectionError, RuntimeError, ValueError, requests.exceptions.RequestException, ray.exceptions.RayError)


class Job(NamedTuple):
    """What the cluster knows of a job. `exit_code` is None while it runs; times are seconds since 1970."""

    id: str
    status: str
    entrypoint: str
    message: str
    exit_code: int | None
    started: float | None
    ended: float | None

    @property
    def is_over(self) -> bool:
        over: bool = JobStatus(self.status).is_terminal()
        return over


class Jobs:
    """The jobs of the cluster whose dashboard is at `address`, such as http://HEAD:8265.

    Every method raises ClusterError where the cluster does not answer, wants another token or refuses.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        with _without(_OVERRIDES):
            self._client = self._asked(lambda: JobSubmissionClient(address))

    def submit(
        self,
        command: Sequence[str],
        *,
        working_dir: str | None = None,
        image: str | None = None,
        needs: Sequence[str] = (),
    ) -> str:
        """Start `patchstream COMMAND...` on the cluster; gives the job's id.

        The code is that of `working_dir`, of the container `image`, or what is installed on the cluster. `needs` are
        names of variables that the cluster's machines must have; no value leaves this machine.
        """
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S), "PYTHONUNBUFFERED": "1"}
        if needs:
            variables[NEEDED_VARIABLES] = " ".join(needs)
        environment: dict[str, Any] = {"env_vars": variables}
        if working_dir:
            environment["working_dir"] = working_dir
        if image:
            environment["image_uri"] = image
        entrypoint = shlex.join(["python", "-m", "jobs", *command])
        metadata = {"patchstream": VERSION}
        job: str = self._asked(
            lambda: self._client.submit_job(entrypoint=entrypoint, runtime_env=environment, metadata=metadata)
        )
        return job

    def look(self, job: str) -> Job:
        """How `job` stands. Raises ClusterError where there is none of that id."""
        found = self._asked(lambda: self._client.get_job_info(job))
        return Job(
            id=job,
            status=str(found.status.value),
            entrypoint=found.entrypoint,
            message=found.message or "",
            exit_code=_exit_code(found),
            started=found.start_time / 1e3 if found.start_time else None,
            ended=found.end_time / 1e3 if found.end_time else None,
        )

    def stop(self, job: str) -> Job:
        """Tell `job` to stop, and wait until it has written what it held."""
        self._asked(lambda: self._client.stop_job(job))
        deadline = time.monotonic() + _STOP_WAIT_S + _LOST_S
        while True:
            why: Exception | None = None
            try:
                if (found := self.look(job)).is_over:
                    return found
            except ClusterError as error:  # it was there a moment ago, and may be again
                why = error
            if time.monotonic() > deadline:
                unknown = f" as far as is known ({why})" if why else ""
                raise ClusterError(
                    f"{job} was told to stop but has not{unknown}; look at it in {self.address}"
                ) from why
            time.sleep(_AGAIN_S / 4)

    def follow(self, job: str, show: Callable[[str], None], warn: Callable[[str], None] = lambda text: None) -> Job:
        """Pass on the job's log as it grows, until the job is over. A connection that breaks is made again. `warn` is
        told of a log that does not come from a cluster which answers."""
        follower, last, lost_since, warned = _Follower(show), None, None, False
        while True:
            answers = False
            try:
                last = self.look(job)
                answers = True
                if not last.is_over:
                    lost_since = None
                asyncio.run(follower.pass_on(self._client.tail_job_logs(job)))
            except (ClusterError, RuntimeError, aiohttp.ClientError, OSError) as error:  # a TimeoutError is an OSError
                # From the moment it broke, not from the last line: a job may say nothing for hours.
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > _LOST_S:
                    if last is None or not last.is_over:
                        raise ClusterError(self._lost(job, error)) from error
                    warn(f"the rest of the log of {job} could not be read ({redact(str(error)) or 'nothing came'})")
                    return last
                # Silence may be the job's own.
                if answers and not (warned or follower.heard or isinstance(error, TimeoutError)):
                    warned = True
                    warn(
                        f"the log of {job} does not come ({redact(str(error))}), though {redact(self.address)} "
                        "answers; it is asked for again, and the job's end is told without it. What stands between "
                        "must let websockets through"
                    )
                time.sleep(_AGAIN_S)
                continue
            if last.is_over:
                return last
            time.sleep(_AGAIN_S / 4)

    def _lost(self, job: str, error: Exception) -> str:
        return (
            f"{self.address} has not answered for {_LOST_S:g} s ({error}). The job may well go on: "
            f"patchstream status {job} --address {self.address}"
        )

    def _asked(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except _REFUSED as error:
            raise ClusterError(_explained(self.address, error)) from error


@contextlib.contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """No such variables in this process for the duration of the block."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class _Follower:
    """Shows a log that is read from its start again after each broken connection."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._shown = 0
        # Whether anything came over the connection that there was last.
        self.heard = False

    async def pass_on(self, texts: AsyncIterator[str]) -> None:
        """Show what of `texts` has not been shown yet. Raises TimeoutError where none comes for _SILENT_S."""
        seen, self.heard = 0, False
        while True:
            async with asyncio.timeout(_SILENT_S):
                text = await anext(texts, None)
            if text is None:
                return
            self.heard = True
            seen += len(text)
            if seen > self._shown:
                self._show(text[self._shown - seen :])
                self._shown = seen


def _exit_code(found: Any) -> int | None:
    """The exit code of a job that is over: its own; 128 + N where signal N ended it; 143 where it was stopped."""
    if not found.status.is_terminal():
        return None
    if found.status == JobStatus.SUCCEEDED:
        return 0
    code: int | None = found.driver_exit_code
    if code is None:
        return 143 if found.status == JobStatus.STOPPED else 2
    return 128 - code if code < 0 else code


def _explained(address: str, error: BaseException) -> str:
    address, text = redact(address), redact(str(error).strip())
    if isinstance(error, ray.exceptions.AuthenticationError):  # what Ray's client makes of every 401 and 403
        return no_token(address)
    if "does not exist" in text:
        return f"{address} knows no such job ({text.splitlines()[-1]})"
    if isinstance(error, ConnectionError | requests.exceptions.RequestException):
        return (
            f"no Ray dashboard answers at {address} ({text.splitlines()[0] if text else type(error).__name__}); give "
            "--address http://HEAD:8265, through `ray dashboard` or `kubectl port-forward` where it is not exposed"
        )
    return f"{address} does not take the job: {text[-1500:]}"
