"""CSV, TSV and JSONL in batches, with one type for each column from the first row to the last."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from pipeline.sources.reading import open_object
from pipeline.storage import Options, redact
from schemas.errors import SourceError

TEXT_SUFFIXES = frozenset({"csv", "tsv", "jsonl", "ndjson"})
_BATCH_ROWS = 16_384
# Arrow settles the types of a CSV on its first block.
_BLOCK_BYTES = 4 << 20
# From here on a float64 leaves out whole numbers.
_FLOAT_GAPS = 2.0**53
_WHOLE_NUMBER = r"^\s*[+-]?[0-9]{16,}\s*$"
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
        misfit, large = _second_look(source, delimiter, types, storage_options)
        if misfit is None:
            break
        types[misfit] = pa.string()
    if large:
        types |= dict.fromkeys(_rounded(source, delimiter, large, storage_options), pa.string())
    with _opened(source, storage_options) as file, _csv(file, delimiter, types) as reader:
        reader.schema.names  # noqa: B018 - raises if the names are no text
        yield reader.schema.empty_table()
        for batch in reader:
            yield pa.table(batch)


def _csv(file: BinaryIO, delimiter: str, types: dict[str, pa.DataType], columns: list[str] | None = None) -> Any:
    """A reader of `columns`, by default of all, with one type for each that `types` does not name."""
    return pa_csv.open_csv(
        file,
        read_options=pa_csv.ReadOptions(block_size=_BLOCK_BYTES),
        parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(column_types=types, include_columns=columns),
    )


def _second_look(
    source: str, delimiter: str, types: dict[str, pa.DataType], storage_options: Options
) -> tuple[str | None, list[str]]:
    """A column with a value that does not fit the type its first rows suggest: it rides along as text.

    Where all fit, also the columns of floats with values so large that they may have been rounded.
    """
    large: set[str] = set()
    with _opened(source, storage_options) as file, _csv(file, delimiter, types) as reader:
        names: list[str] = reader.schema.names
        try:
            for batch in reader:
                large.update(name for name, column in zip(names, batch.columns, strict=True) if _has_large(column))
        except pa.ArrowInvalid as error:
            found = _MISFIT.search(str(error))
            if found is None or names[int(found[1])] in types:
                raise
            return names[int(found[1])], []
    return None, sorted(large)


def _has_large(column: pa.Array) -> bool:
    return pa.types.is_float64(column.type) and bool(pc.any(pc.greater_equal(pc.abs(column), _FLOAT_GAPS)).as_py())


def _rounded(source: str, delimiter: str, columns: list[str], storage_options: Options) -> set[str]:
    """Those of `columns` with a whole number that no float64 holds: different identifiers would become equal."""
    found: set[str] = set()
    texts = dict.fromkeys(columns, pa.string())
    with _opened(source, storage_options) as file, _csv(file, delimiter, texts, columns) as reader:
        for batch in reader:
            for name in texts.keys() - found:
                numbers = batch[name].filter(pc.match_substring_regex(batch[name], _WHOLE_NUMBER)).to_pylist()
                if any(float(number) != Decimal(number) for number in numbers):
                    found.add(name)
            if len(found) == len(columns):
                break
    return found


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
