"""What a reader of CSV does not tell of the bytes behind its values, seen as they pass: quotes that do not end, numbers
that begin with a zero."""

import re
from typing import BinaryIO

_CLOSED = re.compile(rb'"[^"]*+(?:""[^"]*+)*+"')


class Watched:
    """A CSV that Arrow reads from its beginning in blocks of `block_bytes`, and what has been seen in it so far.

    Fields are those of Arrow's parser (cpp/src/arrow/csv/parser.cc): a quote opens a value only where it comes first,
    and behind the one that closes it the value goes on, up to the delimiter, as it stands. Without `quotes` they are
    characters like any other.

    `quoted`: there were quotes. `open_line`: where the value begins that nothing has closed yet; once it is `settled`,
    nothing will. `zeros`: a number began with a zero, if `numbers` are looked for.
    """

    closed = False

    def __init__(self, file: BinaryIO, delimiter: str, block_bytes: int, *, quotes: bool) -> None:
        self.quoted = self.zeros = self.settled = self._loose = False
        self.numbers = True
        self.open_line: int | None = None
        self._file, self._quotes, self._most_bytes = file, quotes, 2 * block_bytes
        mark = delimiter.encode()
        field = rb'"[^"]*+(?:""[^"]*+)*+"(?=[%b\r\n]|\Z)|[^"%b\r\n][^%b\r\n]*+|[%b\r\n]'.replace(b"%b", mark)
        self._fields = re.compile(b"(?:" + field + b")*+")
        self._behind = re.compile(rb"[^%b\r\n]*+".replace(b"%b", mark))
        # One for each beginning: bytes that stand first in a pattern are searched for by far the fastest.
        number = rb'0[0-9]+(?=["%b\r\n]|\Z)'.replace(b"%b", mark)
        self._zeros = [re.compile(first + number) for first in (mark, b"\n", b'"', b" ")]
        self._lines = 0
        self._rest = b"\n"  # lines are looked at with the break in front of them

    @property
    def ill_quoted(self) -> bool:
        """Whether quotes do not enclose whole values: one is not closed, or something stands behind the closing one."""
        return self._loose or self.open_line is not None

    def read(self, size: int = -1) -> bytes:
        """As of any file."""
        data = self._file.read(size)
        if not data:
            self._finish()
        elif not self.settled:
            self._rest += data if self._lines or len(self._rest) > 1 else data.removeprefix(b"\xef\xbb\xbf")
            stop = max(0, self._rest.rfind(b"\n"))
            lines, self._rest = self._rest[:stop], self._rest[stop:]
            self._look(lines)
            # More than Arrow takes for one line, wherever its blocks begin.
            self.settled = len(self._rest) > self._most_bytes
        return data

    def close(self) -> None:
        """Leaves the file itself open, which is its owner's."""

    def _finish(self) -> None:
        if not self.settled:
            self._look(self._rest, last=True)
            self.settled = True

    def _look(self, lines: bytes, *, last: bool = False) -> None:
        self.open_line = None
        if self._quotes and b'"' in lines:
            self.quoted = True
            place = self._place_of_open(lines)
            if place is not None:
                self.open_line = self._lines + lines.count(b"\n", 0, place)
                if not last:
                    lines, self._rest = lines[:place], lines[place:] + self._rest
        if self.numbers and not self.zeros:
            self.zeros = any(zeros.search(lines) for zeros in self._zeros)
        self._lines += lines.count(b"\n")

    def _place_of_open(self, lines: bytes) -> int | None:
        place = 0
        while (place := self._end(self._fields, lines, place)) < len(lines):
            closed = _CLOSED.match(lines, place)
            if closed is None:
                return place
            self._loose = True
            place = self._end(self._behind, lines, closed.end())
        return None

    @staticmethod
    def _end(pattern: re.Pattern[bytes], lines: bytes, place: int) -> int:
        found = pattern.match(lines, place)
        return found.end() if found else place
