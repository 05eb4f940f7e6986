"""`status`, `verify`, `compact`, `retry`: what concerns a run's directory as it stands."""

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from jobs.options import AsJson, Directory, Force, Options, Verbose, batch_size_of, nested_values, parse_options
from jobs.output import emit, show_rows

_SHOWN_ATTEMPTS = 5


def status(
    directory: Annotated[str, typer.Argument(help="The --out of a run, or with --address a job.", metavar="DIR|JOB")],
    storage_options: Options = None,
    address: Annotated[str | None, typer.Option(help="http://HEAD:8265, to look at a job that was submitted.")] = None,
    as_json: AsJson = False,
) -> int:
    """How far a run has come: rows done, failed and pending, parts and attempts. Or how a submitted job stands."""
    if address:
        from jobs.submit import show_job

        shown = show_job(directory, address)
        emit(json.dumps(dict(shown))) if as_json else show_rows(shown)
        return 0
    from pipeline.maintenance import status as look

    found = look(directory, parse_options(storage_options))
    if as_json:
        emit(json.dumps(found))
        return 0
    rows = [
        ("model", f"{found['model']} ({found['dtype']})"),
        ("manifest", f"{found['manifest_rows']:,} rows" + _replaced(found["replaced"])),
        ("images", f"{found['images']:,}"),
        ("failures", f"{found['failures']:,}" + _causes(found["failures_by_cause"])),
        ("pending", f"{found['pending']:,}"),
        ("parts", f"{found['parts']:,}, {found['bytes'] / 2**20:,.1f} MiB"),
        ("attempts", _last_attempts(found["attempts"])),
    ]
    show_rows(rows)
    return 0


def _replaced(rows: int) -> str:
    return f", {rows:,} of them replaced by newer versions" if rows else ""


def _causes(causes: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in list(causes.items())[:6])
    return f" ({shown})" if shown else ""


def _last_attempts(attempts: list[dict[str, Any]]) -> str:
    told = [f"#{attempt['attempt']} {attempt['status']}" for attempt in attempts[-_SHOWN_ATTEMPTS:]]
    earlier = len(attempts) - len(told)
    return ", ".join([f"{earlier:,} earlier ones"] * bool(earlier) + told) or "none"


def verify(directory: Directory, storage_options: Options = None, as_json: AsJson = False) -> int:
    """Read every part back: checksums, schema, and that each row of the manifest is in exactly one place."""
    from pipeline.maintenance import verify as check

    result = check(directory, parse_options(storage_options))
    if as_json:
        emit(json.dumps(result._asdict()))
    else:
        show_rows(
            [
                ("manifest", f"{result.manifest_rows:,} rows" + _replaced(result.replaced)),
                ("images", f"{result.images:,}"),
                ("failures", f"{result.failures:,}"),
                ("pending", f"{result.pending:,}"),
                ("parts", f"{result.parts:,} read back"),
                ("verdict", "every row is accounted for" if not result.problems else "PROBLEMS"),
            ]
        )
        for problem in result.problems:
            emit(f"  - {problem}")
    return 1 if result.problems else 0


def compact(
    directory: Directory,
    target_mib: Annotated[int, typer.Option(min=1, help="Size to aim at, in MiB.")] = 256,
    force: Force = False,
    storage_options: Options = None,
) -> int:
    """Merge small parts into large ones; a glob over the directory never sees a row twice meanwhile."""
    from pipeline.maintenance import compact as merge

    merged = merge(directory, target_mib << 20, parse_options(storage_options), force=force)
    emit(f"merged {merged:,} parts" if merged else "nothing to merge")
    return 0


def retry(
    context: typer.Context,
    directory: Directory,
    everything: Annotated[
        bool, typer.Option("--all", help="Also failures that are not retryable (403, 404 …).")
    ] = False,
    gpus_per_actor: Annotated[float | None, typer.Option(help="In place of the run's; 0 for CPUs.")] = None,
    actors: Annotated[str | None, typer.Option(help="As for embed.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="In place of the run's, as for embed.")] = None,
    address: Annotated[str | None, typer.Option(help="As for embed.")] = None,
    cluster_wait: Annotated[float, typer.Option(help="As for embed.")] = 0.0,
    timeout: Annotated[float | None, typer.Option(help="In place of the run's, as for embed.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="In place of the run's, as for embed.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="In place of the run's, as for embed.")] = None,
    backend: Annotated[str | None, typer.Option(help="In place of the run's: torch or triton.")] = None,
    triton_url: Annotated[str | None, typer.Option(help="In place of the run's, as for embed.")] = None,
    triton_model: Annotated[str | None, typer.Option(help="In place of the run's, as for embed.")] = None,
    triton_header: Annotated[list[str] | None, typer.Option(help="As for embed; headers are stored nowhere.")] = None,
    force: Force = False,
    storage_options: Options = None,
    json_output: AsJson = False,
    verbose: Verbose = False,
) -> int:
    """Run the failed rows of a directory again, within the limits and where the run did: those worth it, or all."""
    from jobs.console import native_messages_aside
    from jobs.run import EarlySession, run_job
    from pipeline.maintenance import NothingToRetry, reopen_failures
    from pipeline.signals import interruptible

    options = parse_options(storage_options)
    batch = batch_size and batch_size_of(batch_size)
    given = {"gpus_per_actor": gpus_per_actor, "backend": backend, "batch_size": batch}
    changes = {key: value for key, value in given.items() if value is not None} | nested_values(context.params)
    session = EarlySession(address, verbose=verbose, wait_s=cluster_wait)
    with native_messages_aside(verbose), interruptible(), session:
        try:
            reopened, values = reopen_failures(
                directory, everything, options, changes, force=force, connect=session.begin
            )
        except NothingToRetry as nothing:
            emit(str(nothing), to_stderr=True)
            if json_output:
                emit(json.dumps(_summary_of_nothing(directory, options)))
            return 0
        emit(f"{reopened:,} failed rows are pending again", to_stderr=True)
        return run_job(
            values, address=address, report=True, json_output=json_output, verbose=verbose, wait_s=cluster_wait,
            session=session,
        )  # fmt: skip


def _summary_of_nothing(directory: str, storage_options: dict[str, Any]) -> dict[str, Any]:
    """The status, and what the summary of a run has besides."""
    from pipeline.maintenance import status as look

    found = look(directory, storage_options)
    return {**found, "rows": found["manifest_rows"] - found["replaced"], "report": None, "attempt": None}


COMMANDS: dict[str, Callable[..., Any]] = {"status": status, "verify": verify, "compact": compact, "retry": retry}
