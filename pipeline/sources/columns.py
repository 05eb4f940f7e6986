"""Manifest tables without `row`, and the user's columns in types that every Parquet reader knows."""

import json
from collections.abc import Mapping, Sequence, Set
from typing import Any

import pyarrow as pa

from schemas.errors import SourceError
from schemas.tables import MANIFEST_FIELDS, user_column_name

CONTENT_FIELDS = MANIFEST_FIELDS[1:]  # `row` is given out when the manifest is frozen


class ColumnMisfit(SourceError):
    """A value of `column` does not fit into the type that the manifest has for it. `zeros`: the only reason is leading
    zeros (an identifier such as 007 in a column of integers)."""

    def __init__(self, message: str, column: str, *, zeros: bool) -> None:
        super().__init__(message)
        self.column, self.zeros = column, zeros


def content_table(uris: Sequence[str], fixed: Mapping[str, Sequence[Any]], user: pa.Table | None = None) -> pa.Table:
    """`uris`, the fixed columns that are known, nulls for the others, `user`.

    Raises SourceError when two columns of the user's would go by one name.
    """
    known = {"uri": uris, **fixed}
    columns: list[pa.Array | pa.ChunkedArray] = [
        _array(known[field.name], field.type) if field.name in known else pa.nulls(len(uris), field.type)
        for field in CONTENT_FIELDS
    ]
    names = user.column_names if user is not None else []
    mine = [user_column_name(name) for name in names]
    clash = sorted({name for name in mine if mine.count(name) > 1})
    if clash:
        raise SourceError(f"two columns of the table would both be called `{clash[0]}`; rename one of them")
    theirs = [_plain(user.column(place)) for place in range(len(names))] if user is not None else []
    fields = [*CONTENT_FIELDS, *(pa.field(name, column.type) for name, column in zip(mine, theirs, strict=True))]
    return pa.table([*columns, *theirs], schema=pa.schema(fields))


def shown_name(name: str) -> str:
    """A name for what holds UTF-8 only: a byte that is none is shown as `\\udcXX`, which readers of images know."""
    return name.encode("utf-8", "backslashreplace").decode()


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # Arrow holds UTF-8 only
        return pa.array([None if value is None else shown_name(value) for value in values], kind)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without dictionaries, extensions and structs that have no fields, which differ from batch to batch, and without
    views, which Arrow cannot take rows of (`array_take`, 26.0)."""
    if isinstance(column.type, pa.BaseExtensionType):
        return _plain(pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type))
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    if _has_empty_struct(column.type):
        texts = [None if value is None else json.dumps(value, default=str) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])
    plain = _without_views(column.type)
    return column if plain == column.type else column.cast(plain)


def _without_views(kind: pa.DataType) -> pa.DataType:
    """The same type with large texts and bytes in the place of views, at any depth."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    fields = [kind.field(place) for place in range(kind.num_fields)]
    inner = [field.with_type(_without_views(field.type)) for field in fields]
    if inner == fields:
        return kind
    if pa.types.is_struct(kind):
        return pa.struct(inner)
    if pa.types.is_map(kind):
        return pa.map_(inner[0].type.field(0), inner[0].type.field(1), kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(inner[0], kind.list_size)
    return pa.list_(inner[0]) if pa.types.is_list(kind) else pa.large_list(inner[0])


def _has_empty_struct(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and not kind.num_fields:
        return True
    return any(_has_empty_struct(kind.field(place).type) for place in range(kind.num_fields))


def concatenated(tables: Sequence[pa.Table]) -> pa.Table:
    """The tables one after the other, with nulls where one lacks a column. Raises SourceError as `unified` does."""
    schema = unified([table.schema for table in tables])
    return pa.concat_tables([conformed(table, schema) for table in tables])


def unified(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """A schema that all fit into. Whole numbers here and text there are text: identifiers, of which some begin with a
    zero and those of one file happen not to. Raises SourceError for text here and other numbers there.
    """
    texts = {field.name for schema in schemas for field in schema if _is_text(field.type)}
    try:
        return pa.unify_schemas([_with_texts(schema, texts) for schema in schemas], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise SourceError(
            f"the sources do not agree on what a column holds ({error}). Give it one type in all of them, or another "
            "name in one"
        ) from error


def _with_texts(schema: pa.Schema, texts: Set[str]) -> pa.Schema:
    changed = (field.name in texts and pa.types.is_integer(field.type) for field in schema)
    return pa.schema(
        [field.with_type(pa.string()) if text else field for field, text in zip(schema, changed, strict=True)]
    )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with exactly the columns of `schema`, nulls where it lacks one.

    Raises ColumnMisfit for a value that the column's type there cannot hold.
    """
    if table.schema.equals(schema):
        return table
    present = set(table.column_names)
    columns = [
        _cast(table[field.name], field) if field.name in present else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _cast(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    zeros = False
    try:
        found = column.cast(field.type)
        zeros = _is_text(column.type) and pa.types.is_integer(field.type) and not found.cast(column.type).equals(column)
        if zeros:
            raise pa.ArrowInvalid("an identifier such as 007 would lose its zeros")
        return found
    except pa.ArrowException as error:
        raise ColumnMisfit(
            f"the sources do not agree on what column `{field.name}` holds: {column.type} in one, which does not fit "
            f"into the {field.type} that all of them together need ({error}). Give it one type in all of them, or "
            "another name in one",
            field.name,
            zeros=zeros,
        ) from error
