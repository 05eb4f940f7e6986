"""The command line: which command lives where, and how errors reach a person.

Modules named here import nothing heavy until one of their commands runs, so that `--help` answers at once.
"""

import functools
import os
import socket
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer

from jobs.output import emit
from schemas.errors import ClusterError, PatchstreamError
from schemas.machines import NEEDED_VARIABLES
from schemas.redaction import named, redact

_MODULES = (
    "jobs.embed",
    "jobs.directory",
    "jobs.models",
    "jobs.predict",
    "jobs.plan",
    "jobs.benchmark",
    "jobs.submit",
    "jobs.retrieve",
    "jobs.retrieve_groups",
    "jobs.retrieve_labels",
    "jobs.report",
    "jobs.explore",
    "jobs.export_triton",
    "jobs.demo.command",
)

app = typer.Typer(
    name="patchstream",
    help="A bucket of images in, an exact Parquet dataset of ViT/BEiT features and labels out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _answered_here(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, returning what typer would answer itself, and without a word: Ctrl-C as the exit code 130, the end of
    a file as if it were Ctrl-C, a connection that broke as if it were standard output. `run_command` raises it."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (KeyboardInterrupt, EOFError, BrokenPipeError) as error:
            return error

    return command


for _module in _MODULES:
    for _name, _function in import_module(_module).COMMANDS.items():
        app.command(_name)(_answered_here(_function))


# Wrong options. Older versions of typer raise click's exceptions, newer ones their own copies of them.
_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def run_command(arguments: list[str]) -> int:
    """Run one command; returns the exit code. Errors are one message on standard error."""
    verbose = "--verbose" in arguments or bool(os.environ.get("PATCHSTREAM_VERBOSE"))
    try:
        _check_variables()
        code = app(arguments, standalone_mode=False)
        if isinstance(code, BaseException):
            raise code
        return code if isinstance(code, int) else 0
    except PatchstreamError as error:
        return _fail(error, str(error), error.exit_code, verbose)
    except typer.Abort:
        return _fail(None, "interrupted", 130, False)
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted", 130, verbose)
    except typer.Exit as done:
        return done.exit_code
    except _USAGE_ERROR as error:
        error.show()
        return 2
    except OSError as error:
        again = "; another command may have replaced it meanwhile" if isinstance(error, FileNotFoundError) else ""
        message = f"{named(error)}{again}"
        message += ". PATCHSTREAM_VERBOSE=1 in the environment shows where it happened"
        return _fail(error, message, 2, verbose)
    except Exception as error:  # noqa: BLE001  what nobody foresaw, without what must not be printed
        _show_traceback(error)
        return 1


def _check_variables() -> None:
    """Raise ClusterError where this machine lacks a variable that `submit --env` named: a store would refuse later, or
    for another reason. The other machines are asked by `cluster.check.check_nodes`."""
    missing = [name for name in os.environ.get(NEEDED_VARIABLES, "").split() if not os.environ.get(name)]
    if missing:
        raise ClusterError(
            f"{', '.join(missing)} not set in the environment of {socket.gethostname()}, where the command runs, but "
            "every machine must have what `submit --env` names. Set it where `ray start` runs, or leave out --env"
        )


def _show_traceback(error: BaseException) -> None:
    emit(redact("".join(traceback.format_exception(error))), to_stderr=True, newline=False)


def _fail(error: BaseException | None, message: str, code: int, verbose: bool) -> int:
    if verbose and error is not None:
        _show_traceback(error)
    emit(f"error: {message}" if code == 2 else message, to_stderr=True)
    return code
