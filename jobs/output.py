"""Words for the person: on standard output, or beside it."""

import json
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import typer

from schemas.redaction import holds_secret


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


def show_rows(rows: list[tuple[str, str]]) -> None:
    """A small two-column table on standard output."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        emit(f"{name:<{width}}  {value}")


def with_options(command: str, storage_options: Mapping[str, Any]) -> str:
    """`command`, to be printed, with the storage options that it needs as well; in words if they hold a credential."""
    if not storage_options:
        return command
    text = json.dumps(storage_options, default=str)
    if holds_secret(text):
        return f"{command} --storage-options … (as they were given: they hold a credential, which is not shown)"
    return f"{command} --storage-options {shlex.quote(text)}"
