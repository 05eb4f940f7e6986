"""Whether the quotes of a CSV or TSV enclose values, and where one is not closed: Arrow takes either as it comes."""

import csv
import logging
import re
from collections.abc import Iterator
from typing import NamedTuple

from pipeline.storage import redact
from schemas.errors import SourceError

_READ_BYTES = 4 << 20
_IN_QUOTES = re.compile(r'(?:"[^"]*")+')
_ENCLOSED = re.compile(r'(?:^|\t)"[^"]*"(?=[\t\r\n]|$)')

_log = logging.getLogger(__name__)


class _Rows(NamedTuple):
    """What the rows of a file show.

    `ill_line`: where the first row begins of which a quote is not closed. `spanning`: rows that span lines; `first`:
    the number of the first of them.
    """

    ill_line: int | None
    spanning: int
    first: int


def quotes_enclose(path: str, source: str, delimiter: str, most_characters: int) -> bool:
    """Whether quotes are to be read as what encloses values in the local file `path`, which holds `source`.

    In a TSV, where many take quotes for characters like any other, they are that unless all enclose whole values or a
    name in the header is in quotes. Raises SourceError for a quote that nothing closes within `most_characters`.
    """
    if not _has_quotes(path):
        return False
    rows = _rows(path, delimiter, most_characters, strict=delimiter == "\t")
    if delimiter == "\t" and rows.ill_line is not None:
        if not _names_in_quotes(path):
            _tell_characters(path, source, rows.ill_line)
            return False
        rows = _rows(path, delimiter, most_characters)
    if rows.ill_line is not None:
        raise SourceError(
            f"{redact(source)}, line {rows.ill_line}: a quoted value in the row that starts here is never closed (or "
            f"not within {most_characters:,} characters), so the rest of the file would become part of it. Close the "
            "quote; inside a quoted value, write a literal quote twice"
        )
    if rows.spanning:
        _log.warning(
            "%s: in %s rows (the first is row %s) a value in quotes spans several lines. Where that is not meant, "
            "write a quote that is part of a value as two, in a value that is in quotes itself",
            redact(source),
            f"{rows.spanning:,}",
            f"{rows.first:,}",
        )
    return True


def _has_quotes(path: str) -> bool:
    with open(path, "rb") as file:
        return any(b'"' in block for block in iter(lambda: file.read(_READ_BYTES), b""))


def _lines(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        yield from file


def _rows(path: str, delimiter: str, most_characters: int, *, strict: bool = False) -> _Rows:
    """With `strict`, ill is a row too in which something stands behind the quote that closes a value."""
    over = False

    def lines() -> Iterator[str]:
        nonlocal over
        yield from _lines(path)
        over = True

    csv.field_size_limit(max(csv.field_size_limit(), most_characters))
    reader = csv.reader(lines(), delimiter=delimiter, strict=strict)
    line, number, spanning, first = 1, -1, 0, 0  # the header is no row
    try:
        for row in reader:
            if over:  # more lines were asked for to close a quote
                return _Rows(line, spanning, first)
            number += bool(row)
            if reader.line_num > line and number > 0:
                spanning, first = spanning + 1, first or number
            line = reader.line_num + 1
    except csv.Error:
        return _Rows(line, spanning, first)
    return _Rows(None, spanning, first)


def _names_in_quotes(path: str) -> bool:
    header = next((line.rstrip("\r\n") for line in _lines(path) if line.strip("\r\n")), "")
    return any(_IN_QUOTES.fullmatch(name) for name in header.split("\t"))


def _tell_characters(path: str, source: str, line: int) -> None:
    if any(_ENCLOSED.search(text) for text in _lines(path)):
        _log.warning(
            "%s: quotes are read as part of the values, also where they enclose whole ones, because in the row that "
            "begins in line %s one does not. Where quotes are meant to enclose values, put the names in the header in "
            "quotes, and write a quote that is part of a value as two, in a value that is in quotes itself",
            redact(source),
            f"{line:,}",
        )
