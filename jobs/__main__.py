"""`python -m jobs`, and the `patchstream` script: run a command, turn errors into one message and an exit code."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code (0, 2, 3, 130, 143; see the README)."""
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


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if code >= 128 else sys.exit(code)
