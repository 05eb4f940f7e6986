"""CSV and TSV in batches, with one type for each column from the first row to the last.

A table is read three times, from the local disk: for its quotes, for the types that hold all its values, and for its
rows. Arrow would settle the types on the first block.
"""

import codecs
import gzip
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from pipeline.addresses import scheme
from pipeline.sources.quotes import quotes_enclose
from pipeline.sources.reading import open_unpacked, source_error
from pipeline.storage import Options, redact
from pipeline.store_errors import NO_ROOM
from schemas.errors import SourceError

# A row has to fit into one.
_BLOCK_BYTES = 4 << 20
_MISSING = pa_csv.ConvertOptions().null_values
_INTEGER, _FLOAT, _TIME = pa.int64(), pa.float64(), pa.time32("s")
# What values may be, the first that holds all of a column; else they are text.
_KINDS = (
    *(_INTEGER, pa.bool_(), pa.date32(), _TIME),
    *(pa.timestamp(unit, zone) for unit in ("s", "ns") for zone in (None, "UTC")),
    _FLOAT,
)
# Also `0x1f`, which Arrow takes for a number.
_ZERO_IN_FRONT = "^[+-]?0[0-9xX]"
# From 16 digits on a float64 leaves out whole numbers.
_LONG_NUMBER = "^[+-]?[0-9]{16,}$"
_NO_TIME = "^[^:]*$"

_log = logging.getLogger(__name__)


def read_delimited(source: str, delimiter: str, uri_column: str, storage_options: Options) -> Iterator[pa.Table]:
    """Tables of some thousand rows, and an empty one in front. Raises SourceError for quotes that are not closed and
    for UTF-16, and Arrow's errors."""
    with _on_disk(source, storage_options) as path:
        with open(path, "rb") as file:
            refuse_utf_16(source, file.read(2))
        quotes = quotes_enclose(path, source, delimiter, 2 * _BLOCK_BYTES)
        names: list[str] = []
        columns: list[_Column] = []
        for batch in _batches(path, delimiter, quotes):
            names = batch.schema.names
            columns = columns or [_Column(is_text=name == uri_column) for name in names]
            for column, values in zip(columns, batch.columns, strict=True):
                column.look(values)
        for name in (name for name, column in zip(names, columns, strict=True) if not column.is_unicode):
            if name == uri_column:
                raise SourceError(f"{redact(source)}: column `{name}` is no UTF-8; save the table as UTF-8")
            _log.warning(
                "%s: column `%s` is no UTF-8 and rides along as bytes; save the table as UTF-8", redact(source), name
            )
        for batch in _batches(path, delimiter, quotes):
            read = [column.read(values) for column, values in zip(columns, batch.columns, strict=True)]
            yield pa.table(read, names=names)


def refuse_utf_16(source: str, start: bytes) -> None:
    """Excel's "Unicode text" and PowerShell's `>` write it; a byte order mark tells."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SourceError(f"{redact(source)} is UTF-16; save it as UTF-8")


@contextmanager
def _on_disk(source: str, storage_options: Options) -> Iterator[str]:
    """The path of a local file with what `source` holds, unpacked."""
    with open_unpacked(source, storage_options) as file:
        if scheme(source) == "file" and not isinstance(file, gzip.GzipFile):
            yield file.name
            return
        with tempfile.NamedTemporaryFile(prefix="patchstream-") as copy:
            try:
                shutil.copyfileobj(file, copy, _BLOCK_BYTES)
                copy.flush()
            except gzip.BadGzipFile:
                raise
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise source_error(source, error) from error
                raise SourceError(
                    f"{redact(source)} cannot be copied to {tempfile.gettempdir()}, where it is read from "
                    f"({error.strerror}); make room there, or name another folder with TMPDIR"
                ) from error
            yield copy.name


def _batches(path: str, delimiter: str, quotes: bool) -> Iterator[pa.RecordBatch]:
    """All columns as bytes; an empty batch first."""
    form = pa_csv.ParseOptions(delimiter=delimiter, quote_char='"' if quotes else False, newlines_in_values=quotes)
    size = pa_csv.ReadOptions(block_size=_BLOCK_BYTES)
    with pa.OSFile(os.fsencode(path)) as file, pa_csv.open_csv(file, size, form) as reader:
        schema = pa.schema([(name, pa.binary()) for name in reader.schema.names])
    types = pa_csv.ConvertOptions(column_types=schema)
    yield pa.record_batch([pa.array([], field.type) for field in schema], schema=schema)
    with pa.OSFile(os.fsencode(path)) as file, pa_csv.open_csv(file, size, form, types) as reader:
        yield from reader


class _Column:
    """What a column has shown, and how its values are read then.

    Text stays as it stands: in other columns blanks around a value and Arrow's names for one that is missing (``,
    `NA`) do not count. Identifiers are text in which values may be missing: a column of whole numbers of which one
    begins with a zero, or one is such as neither 64 bits with sign nor a float64 holds.
    """

    def __init__(self, *, is_text: bool) -> None:
        self._kinds = () if is_text else _KINDS
        self.is_unicode = True
        self._seen = self._zeros = self._beyond_float = False

    def look(self, values: pa.Array) -> None:
        texts = _cast(values, pa.string())
        if texts is None:
            self._kinds, self.is_unicode = (), False
        if not self._kinds:
            return
        texts = _present(texts).drop_null()
        self._seen = self._seen or len(texts) > 0
        # One first: Arrow tells of an error only when it has tried all, each at length.
        kinds = [kind for kind in self._kinds if _cast(texts[:1], kind) is not None]
        self._kinds = tuple(kind for kind in kinds if _cast(texts, kind) is not None)
        if _INTEGER in self._kinds and not self._zeros:
            self._zeros = bool(pc.any(pc.match_substring_regex(texts, _ZERO_IN_FRONT)).as_py())
        if _FLOAT in self._kinds and not self._beyond_float:
            numbers = texts.filter(pc.match_substring_regex(texts, _LONG_NUMBER)).to_pylist()
            self._beyond_float = any(float(number) != Decimal(number) for number in numbers)

    def read(self, values: pa.Array) -> pa.Array:
        if not self._kinds:
            return values.cast(pa.string()) if self.is_unicode else values
        if not self._seen:
            return pa.nulls(len(values))
        texts, kind = values.cast(pa.string()), self._kinds[0]
        if (kind == _INTEGER and self._zeros) or (kind == _FLOAT and self._beyond_float):
            return pc.if_else(pc.is_valid(_present(texts)), texts, pa.scalar(None, pa.string()))
        return _cast(_present(texts), kind)


def _present(texts: pa.Array) -> pa.Array:
    trimmed = pc.utf8_trim(texts, characters=" \t")
    # An array at the top of a module would import pandas with it.
    return pc.if_else(pc.is_in(trimmed, pa.array(_MISSING)), pa.scalar(None, pa.string()), trimmed)


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array | None:
    """None where some do not fit."""
    try:
        if kind != _TIME:
            return values.cast(kind)
        if pc.any(pc.match_substring_regex(values, _NO_TIME)).as_py():
            return None
        # Arrow reads a time from a CSV, and from texts only with a day.
        return pc.binary_join_element_wise("1970-01-01T", values, "").cast(pa.timestamp("s")).cast(kind)
    except pa.ArrowInvalid:
        return None
