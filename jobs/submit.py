"""`submit`: any command of this program as a Ray job, and `status` of such a job."""

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.output import emit
from schemas.errors import ClusterError, SpecError
from schemas.redaction import holds_secret, redact

if TYPE_CHECKING:
    from cluster.submission import Job, Jobs

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# They need the terminal here, a browser, or standard input, which a Ray job has not.
_NOT_HERE = ("submit", "explore", "predict")


def submit(
    command: Annotated[list[str], typer.Argument(help="The command, after `--`: embed SOURCE --model M --out DIR.")],
    address: Annotated[
        str, typer.Option(help="The dashboard of the cluster: http://HEAD:8265.", envvar="RAY_API_SERVER_ADDRESS")
    ],
    working_dir: Annotated[
        str | None, typer.Option(help="Upload this folder (or .zip) and run the code in it, such as `.`.")
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(help="Run in this container image (the nodes need podman), which no variable of a node reaches."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", help="NAME of a variable that the cluster's machines must have (repeatable)."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the log; print the job's id.")] = False,
) -> int:
    """Run a command on a cluster as a Ray job, follow its log, and end with its exit code."""
    _check_command(command)
    _check_names(env or [])
    if working_dir and image:
        raise SpecError("--working-dir and --image both bring the code; give one of them")
    if image and env:
        raise SpecError(
            f"--env {env[0]} with --image: Ray starts that container without the variables of the machine it is on, so "
            "none can be there; leave out --env and let the machines' identity open the stores, or leave out --image"
        )
    from cluster.submission import Jobs

    jobs = Jobs(address)
    job = jobs.submit(command, working_dir=working_dir, image=image, needs=env or ())
    if detach:
        emit(job)
        return 0
    emit(f"submitted {job} to {redact(address)}", to_stderr=True)
    return _follow(jobs, job)


def _follow(jobs: "Jobs", job: str) -> int:
    try:
        over = jobs.follow(job, _show, lambda text: emit(text, to_stderr=True))
    except KeyboardInterrupt:
        if not _wants_to_stop():
            at = redact(jobs.address)
            emit(
                f"{job} goes on. Look: patchstream status {job} --address {at}. "
                f"Stop: ray job stop {job} --address {at}",
                to_stderr=True,
            )
            return 130
        emit("stopping; the job writes what it holds …", to_stderr=True)
        over = jobs.stop(job)
    return _ended(over)


def _ended(over: "Job") -> int:
    if over.exit_code is None:
        raise ClusterError(f"{over.id} is {over.status} and has no exit code yet")
    if over.exit_code:
        why = over.message.splitlines()[0] if over.message else over.status
        emit(f"{over.id}: {over.status.lower()}, exit code {over.exit_code} ({why:.200})", to_stderr=True)
    return over.exit_code


def _show(text: str) -> None:
    emit(text, newline=False)


def _wants_to_stop() -> bool:
    """Asked on a terminal; elsewhere, and at a second Ctrl-C, the job goes on."""
    if not sys.stdin.isatty():
        return False
    try:
        answer: str = typer.prompt("\n[d]etach and let the job go on, or [s]top it?", default="d", err=True)
    except (KeyboardInterrupt, typer.Abort):
        return False
    return answer.strip().lower().startswith("s")


def _check_command(command: Sequence[str]) -> None:
    """Raise SpecError for a command that does not exist, or that holds a credential: Ray shows a job's command line
    to everyone who may see the dashboard."""
    from jobs.cli import app

    known = {name for registered in app.registered_commands if (name := registered.name)} - set(_NOT_HERE)
    if command[0] not in known:
        near = difflib.get_close_matches(command[0], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"it may be one of {', '.join(sorted(known))}"
        raise SpecError(f"submit -- {command[0]}: no such command to run as a job; {hint}")
    for position, word in enumerate(command):
        option, equals, value = word.partition("=")
        given = value if equals and option.startswith("--") else word
        name = option if given is value else command[position - 1]
        if redact(given) != given or (name == "--storage-options" and holds_secret(given)):
            raise SpecError(
                f"the value of {name if name.startswith('--') else 'a source'} holds a credential, which Ray would "
                "show in the dashboard. Put it into the environment of the cluster's machines (a Secret, an identity) "
                "and give its name with --env"
            )
        if option == "--triton-header":
            instead = "Put it into the file of --config, on the cluster: triton.headers"
            if command[0] == "retry":  # which has no such file
                instead = "Run `retry` with it on the cluster's head itself"
            raise SpecError(
                f"--triton-header holds a credential, or may, and Ray would show it in the dashboard. {instead}"
            )


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise SpecError(
                f"--env {name.partition('=')[0]}: give the name of a variable alone. Its value belongs into the "
                "environment of the cluster's machines; Ray would show it in the dashboard"
            )


def show_job(job: str, address: str) -> list[tuple[str, str]]:
    """The rows of `status` for a job of a cluster."""
    from datetime import UTC, datetime

    from cluster.submission import Jobs

    found = Jobs(address).look(job)
    times = [datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds") if at else "" for at in found[-2:]]
    rows = [
        ("job", found.id),
        ("status", found.status.lower()),
        ("command", redact(found.entrypoint)),
        ("started", times[0]),
        ("ended", times[1]),
        ("exit code", "" if found.exit_code is None else str(found.exit_code)),
        ("message", redact(found.message.splitlines()[0]) if found.message else ""),
    ]
    return [(name, value) for name, value in rows if value]


COMMANDS: dict[str, Callable[..., Any]] = {"submit": submit}
