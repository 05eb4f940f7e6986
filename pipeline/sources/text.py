"""CSV, TSV and JSONL in batches, with one type for each column from the first row to the last."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv as pa_csv

from pipeline.sources.reading import open_object
from pipeline.storage import Options, redact
from schemas.errors import SourceError

TEXT_SUFFIXES = frozenset({"csv", "tsv", "jsonl", "ndjson"})
_BATCH_ROWS = 16_384
# Arrow settles the types of a CSV on its first block; a file that fits into one needs no second look.
_BLOCK_BYTES = 4 << 20
# Arrow names the row as well where it happens to know it.
_MISFIT = re.compile(r"In CSV column #(\d+): (?:Row #\d+: )?CSV conversion error")


def read_text(source: str, kind: str, uri_column: str, storage_options: Options) -> Iterator[pa.Table]:
    """Tables of at most some thousand rows. The first may be empty: it shows the columns.

    Raises SourceError for what is no such file.
    """
    try:
        if kind in {"csv", "tsv"}:
            yield from _read_csv(source, "\t" if kind == "tsv" else ",", uri_column, storage_options)
        else:
            yield from _read_jsonl(source, storage_options)
    except (pa.ArrowException, ValueError, EOFError, gzip.BadGzipFile, zlib.error, RecursionError) as error:
        raise SourceError(f"{redact(source)} cannot be read as {kind.upper()}: {redact(str(error))}") from error


@contextmanager
def _opened(source: str, storage_options: Options) -> Iterator[BinaryIO]:
    with open_object(source, storage_options) as file:
        head = file.read(2)
        file.seek(0)
        if head != b"\x1f\x8b":
            yield file
            return
        with gzip.open(file, "rb") as unpacked:
            yield unpacked  # type: ignore[misc]


def _read_csv(source: str, delimiter: str, uri_column: str, storage_options: Options) -> Iterator[pa.Table]:
    types = {uri_column: pa.string()}
    while True:
        misfit = _first_misfit(source, delimiter, types, storage_options)
        if misfit is None:
            break
        types[misfit] = pa.string()
    with _opened(source, storage_options) as file, _csv(file, delimiter, types) as reader:
        reader.schema.names  # noqa: B018 - raises if the names are no text
        yield reader.schema.empty_table()
        for batch in reader:
            yield pa.table(batch)


def _csv(file: BinaryIO, delimiter: str, types: dict[str, pa.DataType]) -> Any:
    return pa_csv.open_csv(
        file,
        read_options=pa_csv.ReadOptions(block_size=_BLOCK_BYTES),
        parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(column_types=types),
    )


def _first_misfit(source: str, delimiter: str, types: dict[str, pa.DataType], storage_options: Options) -> str | None:
    """A column with a value that does not fit the type its first rows suggest: it rides along as text."""
    with _opened(source, storage_options) as file:
        if len(file.read(_BLOCK_BYTES)) < _BLOCK_BYTES:
            return None
        file.seek(0)
        with _csv(file, delimiter, types) as reader:
            names: list[str] = reader.schema.names
            try:
                for _ in reader:
                    pass
            except pa.ArrowInvalid as error:
                found = _MISFIT.search(str(error))
                if found is None or names[int(found[1])] in types:
                    raise
                return names[int(found[1])]
    return None


def _read_jsonl(source: str, storage_options: Options) -> Iterator[pa.Table]:
    """Arrow's own reader refuses a field that first turns up, or first is not null, after its first block."""
    number = 0
    with _opened(source, storage_options) as file:
        while lines := list(islice(file, _BATCH_ROWS)):
            rows = [_object(source, number + place, line) for place, line in enumerate(lines, 1) if line.strip()]
            number += len(lines)
            names = list(dict.fromkeys(name for row in rows for name in row))
            columns = [_column(source, name, [row.get(name) for row in rows]) for name in names]
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
        raise SourceError(f"{redact(source)}: column `{name}` does not hold one kind of value ({error})") from error
