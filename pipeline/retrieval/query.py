"""DuckDB as everything here asks it: names and texts quoted, its refusals as ours."""

import re

import duckdb
import pyarrow as pa

from schemas.errors import SpecError


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
    """One query's result, or its first `limit` rows. Raises SpecError with DuckDB's own explanation."""
    try:
        relation = connection.sql(query)
        if relation is None:
            return pa.table({})
        return (relation if limit is None else relation.limit(limit)).to_arrow_table()
    except duckdb.Error as error:
        raise SpecError(f"{_first_lines(error)}\nin: {query}") from None


def _first_lines(error: Exception) -> str:
    return re.sub(r"\n+", "\n", str(error)).strip()


def quote(name: str) -> str:
    """`name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """`text` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"
