"""CSV, TSV and JSONL in batches, with one type for each column from the first row to the last."""

import gzip
import json
import logging
import re
import zlib
from collections.abc import Iterator, Set
from contextlib import contextmanager
from decimal import Decimal
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from pipeline.sources.quotes import Watched
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
_ZERO_IN_FRONT = r"^\s*0[0-9]"
# Arrow names the row as well where it happens to know it.
_MISFIT = re.compile(r"In CSV column #(\d+): (?:Row #\d+: )?CSV conversion error")
# A line that is longer than a block, in Arrow's words.
_TOO_LONG = "straddl"

_log = logging.getLogger(__name__)


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


class _Form(NamedTuple):
    """How a file sets its values apart."""

    delimiter: str
    quotes: bool = True


class _Look(NamedTuple):
    """What reading a CSV for the first time has shown.

    `quotes`: whether they enclose values. `misfit`: a column with a value that does not fit the type its first rows
    suggest. `large`: columns of floats so large that they may have been rounded. `zeros`: columns of integers, if any
    number of the file begins with a zero. `breaks`: rows with a value that spans lines, and the first of them.
    """

    quotes: bool = True
    misfit: str | None = None
    large: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    breaks: tuple[int, int] = (0, 0)


def _read_csv(source: str, delimiter: str, uri_column: str, storage_options: Options) -> Iterator[pa.Table]:
    form, types = _Form(delimiter), {uri_column: pa.string()}
    while True:
        look = _second_look(source, form, types, storage_options)
        if not look.quotes:
            form, types = form._replace(quotes=False), {uri_column: pa.string()}
        elif look.misfit is not None:
            types[look.misfit] = pa.string()  # it rides along as text
        else:
            break
    if look.breaks[0]:
        _tell_breaks(source, *look.breaks)
    identifiers = _identifiers(source, form, look, storage_options) if look.large or look.zeros else set()
    types |= dict.fromkeys(identifiers, pa.string())
    with _opened(source, storage_options) as file, _csv(file, form, types) as reader:
        reader.schema.names  # noqa: B018 - raises if the names are no text
        yield reader.schema.empty_table()
        for batch in reader:
            yield _with_nulls(pa.table(batch), identifiers)


def _with_nulls(table: pa.Table, identifiers: Set[str]) -> pa.Table:
    """What is missing in a column of numbers (`NA`, an empty cell) is missing too where these are read as text."""
    for name in identifiers:
        missing = pc.is_in(table[name], pa.array(pa_csv.ConvertOptions().null_values))
        column = pc.if_else(missing, pa.scalar(None, pa.string()), table[name])
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _csv(file: Any, form: _Form, types: dict[str, pa.DataType], columns: list[str] | None = None) -> Any:
    """A reader of `columns`, by default of all, with one type for each that `types` does not name."""
    return pa_csv.open_csv(
        file,
        read_options=pa_csv.ReadOptions(block_size=_BLOCK_BYTES),
        parse_options=pa_csv.ParseOptions(
            delimiter=form.delimiter, quote_char='"' if form.quotes else False, newlines_in_values=form.quotes
        ),
        convert_options=pa_csv.ConvertOptions(column_types=types, include_columns=columns),
    )


def _second_look(source: str, form: _Form, types: dict[str, pa.DataType], storage_options: Options) -> _Look:
    """Read all of it, up to a misfit.

    Raises SourceError for a quote that nothing closes: all from there on would be one value. In a TSV, where many take
    quotes for characters like any other, they are that unless all enclose whole values, or some are meant to.
    """
    with _opened(source, storage_options) as file:
        watched = Watched(file, form.delimiter, _BLOCK_BYTES, quotes=form.quotes)
        try:
            look = _read_through(watched, form, types)
        except pa.ArrowInvalid as error:
            settled = watched.settled or _TOO_LONG in str(error)
            if form.delimiter == "\t" and watched.quoted:
                watched = _watched_to_the_end(source, form, storage_options)
            if _quotes_are_characters(source, watched, form):
                return _Look(quotes=False)
            if watched.open_line is None or not settled:
                raise
            raise _unclosed(source, watched.open_line) from error
    if look.misfit is not None:
        return look  # a look at the rest, which Arrow has not read, comes with the next one
    if _quotes_are_characters(source, watched, form):
        return _Look(quotes=False)
    if watched.open_line is not None:
        raise _unclosed(source, watched.open_line)
    return look


def _watched_to_the_end(source: str, form: _Form, storage_options: Options) -> Watched:
    """Arrow stops at an error, and may still read ahead then."""
    with _opened(source, storage_options) as file:
        watched = Watched(file, form.delimiter, _BLOCK_BYTES, quotes=form.quotes)
        watched.numbers = False
        while watched.read(_BLOCK_BYTES):
            pass
    return watched


def _quotes_are_characters(source: str, watched: Watched, form: _Form) -> bool:
    if form.delimiter != "\t" or watched.ill_line is None or watched.meant:
        return False
    if watched.enclosed:
        _log.warning(
            "%s: quotes are read as part of the values, also where they enclose whole ones, because in line %s one "
            "does not. Where quotes are meant to enclose values, put the names in the header in quotes, and write a "
            "quote that is part of a value as two, in a value that is in quotes itself",
            redact(source),
            f"{watched.ill_line:,}",
        )
    return True


def _unclosed(source: str, line: int) -> SourceError:
    return SourceError(
        f"{redact(source)}, line {line}: nothing closes the quote with which a value begins here, so that all lines "
        "behind it would be one value. Close it; a quote that is part of a value is written as two, in a value that is "
        "in quotes itself"
    )


def _read_through(watched: Watched, form: _Form, types: dict[str, pa.DataType]) -> _Look:
    large: set[str] = set()
    rows = broken = first = 0
    with _csv(watched, form, types) as reader:
        names: list[str] = reader.schema.names
        whole = [field.name for field in reader.schema if pa.types.is_integer(field.type)]
        watched.numbers = bool(whole)
        try:
            for batch in reader:
                large.update(name for name, column in zip(names, batch.columns, strict=True) if _has_large(column))
                here = _rows_over_lines(batch) if watched.quoted else []
                first = first if broken or not len(here) else rows + int(here[0]) + 1
                broken += len(here)
                rows += batch.num_rows
        except pa.ArrowInvalid as error:
            found = _MISFIT.search(str(error))
            if found is None or names[int(found[1])] in types:
                raise
            return _Look(misfit=names[int(found[1])])
    return _Look(large=tuple(sorted(large)), zeros=tuple(whole) if watched.zeros else (), breaks=(broken, first))


def _has_large(column: pa.Array) -> bool:
    return pa.types.is_float64(column.type) and bool(pc.any(pc.greater_equal(pc.abs(column), _FLOAT_GAPS)).as_py())


def _rows_over_lines(batch: pa.RecordBatch) -> Any:
    texts = [column for column in batch.columns if pa.types.is_string(column.type)]
    found = [pc.fill_null(pc.match_substring(column, "\n"), False).to_numpy(zero_copy_only=False) for column in texts]
    return np.flatnonzero(np.any(found, axis=0)) if found else []


def _tell_breaks(source: str, rows: int, first: int) -> None:
    _log.warning(
        "%s: in %s rows (the first is row %s) a value in quotes spans several lines. Where that is not meant, write a "
        "quote that is part of a value as two, in a value that is in quotes itself",
        redact(source),
        f"{rows:,}",
        f"{first:,}",
    )


def _identifiers(source: str, form: _Form, look: _Look, storage_options: Options) -> set[str]:
    """Columns of numbers which, as numbers, would lose what tells one from another: a zero in front (`007`), or the
    last digits of a whole number that no float64 holds."""
    found: set[str] = set()
    columns = [*look.large, *look.zeros]
    texts = dict.fromkeys(columns, pa.string())
    with _opened(source, storage_options) as file, _csv(file, form, texts, columns) as reader:
        for batch in reader:
            for name in texts.keys() - found:
                if _is_identifier(batch[name], large=name in look.large):
                    found.add(name)
            if len(found) == len(columns):
                break
    return found


def _is_identifier(texts: pa.Array, *, large: bool) -> bool:
    if not large:
        return bool(pc.any(pc.match_substring_regex(texts, _ZERO_IN_FRONT)).as_py())
    numbers = texts.filter(pc.match_substring_regex(texts, _WHOLE_NUMBER)).to_pylist()
    return any(float(number) != Decimal(number) for number in numbers)


def _read_jsonl(source: str, storage_options: Options) -> Iterator[pa.Table]:
    """Arrow's own reader refuses a field that first turns up, or first is not null, after its first block."""
    number = 0
    texts: dict[str, bool] = {}  # of each column with whole numbers or text, whether it is text
    with _opened(source, storage_options) as file:
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
