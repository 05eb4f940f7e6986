"""`python -m jobs`, and the `patchstream` script: run a command, turn errors into one message and an exit code."""

import atexit
import contextlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code (0, 1, 2, 3, 130, 143; see the README)."""
    _check_own_packages()
    from jobs.cli import run_command

    return run_command(sys.argv[1:] if arguments is None else arguments)


def _check_own_packages() -> None:
    """`pipeline` and `schemas` are common names: make sure that Python found ours and not somebody else's."""
    home = Path(__file__).resolve().parent.parent
    for name in ("schemas", "pipeline", "cluster"):
        found = find_spec(name)
        origin = Path(found.origin).resolve() if found and found.origin else None
        if origin is None or origin.parent.parent != home:
            sys.stderr.write(
                f"error: Python finds the package `{name}` at {origin}, not beside {home / 'jobs'}. "
                "Another project's folder comes first on sys.path; run from elsewhere or unset PYTHONPATH\n"
            )
            sys.exit(2)


def entry() -> NoReturn:
    """Run the command line and end the process with its exit code.

    What was registered for the end is run, but the interpreter is not taken down: the native thread pools of Arrow, Ray
    and torch wind down in no set order, and now and then abort a process (code 134) whose work is done and told.
    """
    code = main()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it has gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    entry()
