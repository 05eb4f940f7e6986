"""DuckDB as everything here asks it: names and texts quoted, its refusals as ours."""

import os
import re
import shutil
import socket
import tempfile
import uuid
from pathlib import Path

import duckdb
import pyarrow as pa

from pipeline.processes import is_running
from pipeline.signals import heeding_signals
from schemas.errors import OutputError, PatchstreamError, SpecError

MEMORY = "2GiB"
TEMPORARY = "patchstream-duckdb-"


def view_names(names: list[str]) -> dict[str, str]:
    """What results of these names are called in SQL: DuckDB takes A and a for one, so the second becomes a_1.

    Where there is an a_1 it keeps its name, and the second of A and a becomes a_2.
    """
    taken = {name.casefold() for name in names}
    views: dict[str, str] = {}
    for name in names:
        view, number = name, 0
        if name.casefold() in {other.casefold() for other in views}:
            while view.casefold() in taken:
                number += 1
                view = f"{name}_{number}"
        taken.add(view.casefold())
        views[name] = view
    return views


def run_query(connection: duckdb.DuckDBPyConnection, query: str, limit: int | None = None) -> pa.Table:
    """One query's result, or its first `limit` rows. Raises what `refused` makes of DuckDB's errors."""

    def ask() -> pa.Table:
        relation = connection.sql(query)
        if relation is None:
            return pa.table({})
        return (relation if limit is None else relation.limit(limit)).to_arrow_table()

    try:
        return heeding_signals(ask, connection.interrupt)
    except duckdb.Error as error:
        raise refused(error, query) from None


def execute(connection: duckdb.DuckDBPyConnection, statement: str) -> None:
    """Carry out a statement that gives no rows."""
    heeding_signals(lambda: connection.execute(statement), connection.interrupt)


def refused(error: duckdb.Error, query: str) -> PatchstreamError:
    """SpecError with DuckDB's own explanation; OutputError where it had no room, which is no fault of the query."""
    message = f"{_without_gaps(error)}\nin: {query}"
    if not isinstance(error, duckdb.OutOfMemoryException) and TEMPORARY not in str(error):
        return SpecError(message)
    return OutputError(
        f"{message}\nIt takes {MEMORY} of memory, and what does not fit goes to {tempfile.gettempdir()}: make room "
        "there, name another folder with TMPDIR, or ask for less at once"
    )


def _without_gaps(error: Exception) -> str:
    return re.sub(r"\n+", "\n", str(error)).strip()


def temporary_folder() -> str:
    """A name for a connection's temporary files: DuckDB makes the folder when memory is short, and removes it at last.

    What processes of this machine that are no more left in theirs is deleted.
    """
    # Each has its own. Of one name for all it would be closed to other users than the first, and older versions of
    # DuckDB mix up what two processes put into one folder.
    base, ours = Path(tempfile.gettempdir()), f"{TEMPORARY}{socket.gethostname()}-"
    for folder in base.glob(f"{TEMPORARY}*"):
        owner = re.fullmatch(rf"{re.escape(ours)}(\d{{1,9}})-[0-9a-f]{{32}}", folder.name)
        if owner and not is_running(int(owner[1])):
            shutil.rmtree(folder, ignore_errors=True)  # of another user it stays
    return str(base / f"{ours}{os.getpid()}-{uuid.uuid4().hex}")


def quote(name: str) -> str:
    """`name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """`text` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"
