"""`status`, `verify`, `compact`, `retry`: what concerns a run's directory as it stands."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from schemas.redaction import holds_secret

Directory = Annotated[str, typer.Argument(help="The --out of a run.", metavar="DIR")]
Options = Annotated[str | None, typer.Option("--storage-options", help="JSON for fsspec.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_SHOWN_ATTEMPTS = 5

Force = Annotated[bool, typer.Option("--force", help="Take a run that another machine began for dead, and end it.")]


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
    verbose: Annotated[bool, typer.Option("--verbose", help="Show tracebacks and Ray's own output.")] = False,
) -> int:
    """Run the failed rows of a directory again, within the limits and where the run did: those worth it, or all."""
    from jobs.embed import nested_values
    from jobs.run import run_job
    from pipeline.maintenance import NothingToRetry, reopen_failures
    from pipeline.maintenance import status as look

    options = parse_options(storage_options)
    given = {"gpus_per_actor": gpus_per_actor, "backend": backend}
    changes = {key: value for key, value in given.items() if value is not None} | nested_values(context.params)
    try:
        reopened, values = reopen_failures(directory, everything, options, changes, force=force)
    except NothingToRetry as nothing:
        emit(str(nothing), to_stderr=True)
        if json_output:
            found = look(directory, options)
            rows = found["manifest_rows"] - found["replaced"]
            emit(json.dumps({**found, "rows": rows, "report": None, "attempt": None}))  # also what a run's summary has
        return 0
    emit(f"{reopened:,} failed rows are pending again", to_stderr=True)
    return run_job(values, address=address, report=True, json_output=json_output, verbose=verbose, wait_s=cluster_wait)


COMMANDS: dict[str, Callable[..., Any]] = {"status": status, "verify": verify, "compact": compact, "retry": retry}


def parse_options(text: str | None) -> dict[str, Any]:
    """`--storage-options` as a dict."""
    from jobs.embed import json_object

    return json_object(text) if text else {}


def with_options(command: str, storage_options: Mapping[str, Any]) -> str:
    """`command`, to be printed, with the storage options that it needs as well; in words if they hold a credential."""
    if not storage_options:
        return command
    text = json.dumps(storage_options, default=str)
    if holds_secret(text):
        return f"{command} --storage-options … (as they were given: they hold a credential, which is not shown)"
    return f"{command} --storage-options {shlex.quote(text)}"


def options_given(context: typer.Context, *names: str) -> str:
    """Those of the options `names` that stand on the command line, as they are typed; empty if none does."""
    found = []
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in names and source is not None and source.name != "DEFAULT":
            switched_off = context.params[option.name] is False and option.secondary_opts
            found.append((option.secondary_opts if switched_off else option.opts)[0])
    return ", ".join(found)


def show_rows(rows: list[tuple[str, str]]) -> None:
    """A small two-column table on standard output."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        emit(f"{name:<{width}}  {value}")


def emit(text: str, *, to_stderr: bool = False, newline: bool = True) -> None:
    """Text for the person, on a line of its own unless `newline` is False.

    Where the reader has gone (`| head`), nobody hears it; the command goes on, and its exit code is its own.
    """
    try:
        typer.echo(text, err=to_stderr, nl=newline)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, (sys.stderr if to_stderr else sys.stdout).fileno())
        os.close(nowhere)


def _causes(causes: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in list(causes.items())[:6])
    return f" ({shown})" if shown else ""
