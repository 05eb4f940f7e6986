"""Run a job for a person: spec, session, progress, report, summary, exit code. `run` is the same for Python."""

import json
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.console import Screen, native_messages_aside, plain_summary, print_summary
from jobs.output import emit, with_options
from schemas.errors import TooManyFailures
from schemas.machines import Machines
from schemas.spec import JobSpec, build_spec

if TYPE_CHECKING:
    from pipeline.flow import Connect, Summary

_log = logging.getLogger(__name__)


def run(spec: JobSpec, *, address: str | None = None, report: bool = True) -> Any:
    """Run `spec` from Python, write its report, and return its `pipeline.flow.Summary`.

    Errors are those of `schemas.errors`, as for the command: also TooManyFailures, once every row is accounted for.
    """
    from pipeline.flow import run as run_flow
    from pipeline.storage import options_for

    summary = run_flow(spec, partial(_session, spec, address))
    if report:
        _report(summary.out, spec, _log.warning)
    _check_rate(summary, spec.max_failure_rate, options_for(summary.out, spec.storage_options))
    return summary


def run_job(
    values: Mapping[str, Any],
    *,
    address: str | None,
    report: bool,
    json_output: bool,
    verbose: bool,
    attention: tuple[str, int] | None = None,
    wait_s: float = 0.0,
    session: "EarlySession | None" = None,
) -> int:
    """Run the job that `values` describe and tell the person about it; returns the exit code.

    `attention`: a folder for attention maps, and of how many images. `wait_s`: for machines that have yet to come.
    `session`: that of this job, where it has begun.
    """
    spec = build_spec(dict(values))
    write_maps = _attention_writer(spec, *attention) if attention else None
    from pipeline.flow import run as run_flow
    from pipeline.storage import options_for

    opened = partial(_session, spec, address, verbose=verbose, wait_s=wait_s)
    connect: Connect = session.go_on if session else opened
    with native_messages_aside(verbose), Screen(quiet=json_output) as screen:
        summary = run_flow(spec, connect, screen.show)
    page = _report(summary.out, spec, screen.warn) if report else None
    needed = options_for(summary.out, spec.storage_options)
    maps = None
    try:
        maps = write_maps() if write_maps else None
    finally:
        if json_output:
            emit(json.dumps(plain_summary(summary, page, maps)))
        else:
            print_summary(summary, page, maps, needed)
    _check_rate(summary, spec.max_failure_rate, needed)
    return 0


class EarlySession:
    """Ray for a job that must know, before it changes anything, whether it can run: begun by itself, ended by the run,
    or where there is none by the block."""

    def __init__(self, address: str | None, *, verbose: bool, wait_s: float) -> None:
        self._open = partial(_session, address=address, verbose=verbose, wait_s=wait_s)
        self._held = ExitStack()

    def begin(self, spec: JobSpec) -> Machines:
        """Raises ClusterError as `ray_session` does."""
        self._machines = self._held.enter_context(self._open(spec))
        return self._machines

    @contextmanager
    def go_on(self) -> Iterator[Machines]:
        with self._held:
            yield self._machines

    def __enter__(self) -> "EarlySession":
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()


def _session(
    spec: JobSpec, address: str | None, *, verbose: bool = False, wait_s: float = 0.0
) -> AbstractContextManager[Machines]:
    from cluster.session import ray_session
    from pipeline.witnesses import local_witnesses

    shared = partial(local_witnesses, spec)
    return ray_session(address, verbose=verbose, bundles=first_bundles(spec), wait_s=wait_s, shared=shared)


def _attention_writer(spec: JobSpec, directory: str, images: int) -> Callable[[], str]:
    """What writes the maps once the run is done; whether there can be any is checked before the run begins."""
    from pipeline.attention import AttentionMaps, check_attention, write_attention_maps

    maps = AttentionMaps(directory, images)
    info = check_attention(spec, maps)
    return lambda: write_attention_maps(spec, info, maps)


def first_bundles(spec: JobSpec) -> list[dict[str, float]]:
    """What the first actors need, for a cluster that has yet to grow."""
    least = spec.actors.min if spec.actors else 1
    return [{"GPU": spec.gpus_per_actor, "CPU": 1.0} if spec.gpus_per_actor else {"CPU": 1.0}] * least


def _report(out: str, spec: JobSpec, warn: Callable[[str], None]) -> str | None:
    """Write report.html. A picture of the result is not the result: if it fails, the run has still succeeded."""
    from pipeline.report import write_report

    try:
        return write_report(out, storage_options=spec.storage_options)
    except Exception as error:  # noqa: BLE001  whatever it is, the summary and the exit code are the run's
        warn(f"report.html was not written: {str(error) or type(error).__name__}")
        return None


def _check_rate(summary: "Summary", max_failure_rate: float, storage_options: Mapping[str, Any]) -> None:
    rows, failures = summary.rows, summary.failures
    rate = failures / rows if rows else 0.0
    if rate > max_failure_rate or (rows and failures == rows):
        allowed = f"more than --max-failure-rate {max_failure_rate:g}" if failures < rows else "that is all of them"
        query = "select stage, error, count(*) from failures group by all"
        command = f'patchstream sql {shlex.quote(summary.out)} "{query}"'
        raise TooManyFailures(
            f"{failures:,} of {rows:,} images failed ({rate:.1%}), {allowed}. "
            f"See why: {with_options(command, storage_options)}"
        )
