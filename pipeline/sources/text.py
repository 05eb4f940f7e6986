"""CSV, TSV and JSONL in batches, with one type for each column from the first row to the last."""

import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.sources.delimited import read_delimited, refuse_utf_16
from pipeline.sources.reading import open_unpacked
from pipeline.storage import Options, redact
from schemas.errors import SourceError

TEXT_SUFFIXES = frozenset({"csv", "tsv", "jsonl", "ndjson"})
_BATCH_ROWS = 16_384


def read_text(source: str, kind: str, uri_column: str, storage_options: Options) -> Iterator[pa.Table]:
    """Tables of at most some thousand rows. The first may be empty: it shows the columns.

    Raises SourceError for what is no such file.
    """
    try:
        if kind in {"csv", "tsv"}:
            yield from read_delimited(source, "\t" if kind == "tsv" else ",", uri_column, storage_options)
        else:
            yield from _read_jsonl(source, storage_options)
    except (pa.ArrowException, ValueError, EOFError, gzip.BadGzipFile, zlib.error, RecursionError) as error:
        raise SourceError(f"{redact(source)} cannot be read as {kind.upper()}: {redact(str(error))}") from error


def _read_jsonl(source: str, storage_options: Options) -> Iterator[pa.Table]:
    """Arrow's own reader refuses a field that first turns up, or first is not null, after its first block."""
    number = 0
    texts: dict[str, bool] = {}  # of each column with whole numbers or text, whether it is text
    with open_unpacked(source, storage_options) as file:
        refuse_utf_16(source, file.read(2))
        file.seek(0)
        while lines := list(islice(file, _BATCH_ROWS)):
            rows = [_object(source, number + place, line) for place, line in enumerate(lines, 1) if line.strip()]
            number += len(lines)
            names = list(dict.fromkeys(name for row in rows for name in row))
            columns = [_column(source, name, [row.get(name) for row in rows]) for name in names]
            for name, column in zip(names, columns, strict=True):
                text = pa.types.is_string(column.type)
                if (text or pa.types.is_integer(column.type)) and texts.setdefault(name, text) != text:
                    raise _two_kinds(source, name, "whole numbers in some lines, text in others")
            if rows:
                yield pa.table(columns, names=names)


def _object(source: str, line_number: int, line: bytes) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise SourceError(f'{redact(source)}, line {line_number}: a JSON object is needed, such as {{"uri": "a.jpg"}}')
    return value


def _column(source: str, name: str, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except OverflowError as error:
        raise SourceError(
            f"{redact(source)}: column `{name}` holds a whole number beyond 64 bits with sign; write such numbers as "
            "text, in quotes"
        ) from error
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise _two_kinds(source, name, error) from error


def _two_kinds(source: str, name: str, what: object) -> SourceError:
    return SourceError(
        f"{redact(source)}: column `{name}` does not hold one kind of value ({what}); give it one in all lines, such "
        "as text, in quotes"
    )
