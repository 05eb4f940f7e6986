"""What a reader of CSV does not tell of the bytes behind its values, seen as they pass: quotes that do not end, numbers
that begin with a zero."""

import re
from typing import BinaryIO

_BREAK = b"\r\n"
_CLOSED = re.compile(rb'"[^"]*+(?:""[^"]*+)*+"')


class Watched:
    """A CSV that Arrow reads from its beginning in blocks of `block_bytes`, and what has been seen in it so far.

    Fields are those of Arrow's parser (cpp/src/arrow/csv/parser.cc): a quote opens a value only where it comes first,
    and behind the one that closes it the value goes on, up to the delimiter, as it stands. Without `quotes` they are
    characters like any other.

    `quoted`: there were quotes. `open_line`: where the value begins that nothing has closed yet; once it is `settled`,
    nothing will. `loose_line`: the first with something behind the quote that closes a value. `enclosed`: quotes
    enclosed a whole value; `meant`: one, or a name in the header, that shows that they are meant to. `zeros`: a number
    began with a zero, if `numbers` are looked for.
    """

    closed = False

    def __init__(self, file: BinaryIO, delimiter: str, block_bytes: int, *, quotes: bool) -> None:
        self.quoted = self.enclosed = self.meant = self.zeros = self.settled = False
        self.numbers = True
        self.open_line: int | None = None
        self.loose_line: int | None = None
        self._past_header = False
        self._file, self._quotes, self._most_bytes = file, quotes, 2 * block_bytes
        self._mark = mark = delimiter.encode()
        plain = rb'[^"%b\r\n][^%b\r\n]*+|[%b\r\n]'
        simple, any_value = rb'"[^"%b\r\n]*+"(?=[%b\r\n]|\Z)', _CLOSED.pattern + rb"(?=[%b\r\n]|\Z)"
        # Fields that show nothing new: before there was an enclosed value, before one was meant so, and then.
        self._plain, self._simple, self._any = (
            re.compile(b"(?:%s)*+" % field.replace(b"%b", mark))
            for field in (plain, plain + b"|" + simple, plain + b"|" + any_value)
        )
        self._behind = re.compile(rb"[^%b\r\n]*+".replace(b"%b", mark))
        # One for each beginning: bytes that stand first in a pattern are searched for by far the fastest. Arrow trims
        # blanks and tabs around a number.
        number = rb'0[0-9]+[ \t]*+(?=["%b\r\n]|\Z)'.replace(b"%b", mark)
        self._zeros = [re.compile(first + number) for first in {mark, b"\r", b"\n", b'"', b" ", b"\t"}]
        self._lines = 0
        self._rest = _BREAK  # lines are looked at with the break in front of them

    @property
    def ill_line(self) -> int | None:
        """Where quotes do not enclose a whole value: one is not closed, or something stands behind the closing one."""
        return self.open_line if self.loose_line is None else self.loose_line

    def read(self, size: int = -1) -> bytes:
        """As of any file."""
        data = self._file.read(size)
        if not data:
            self._finish()
        elif not self.settled:
            self._rest += data if self._lines or self._rest != _BREAK else data.removeprefix(b"\xef\xbb\xbf")
            stop = max(0, self._rest.rfind(b"\n"), self._rest.rfind(b"\r"))
            stop -= self._rest[:stop].endswith(b"\r") and self._rest[stop:].startswith(b"\n")
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
            self.meant = self.meant or (not self._past_header and self._names_in_quotes(lines))
            place = self._place_of_open(lines)
            if place is not None:
                self.open_line = self._line(lines, place)
                if not last:
                    lines, self._rest = lines[:place], lines[place:] + self._rest
        if self.numbers and not self.zeros:
            self.zeros = any(zeros.search(lines) for zeros in self._zeros)
        self._past_header = self._past_header or bool(lines.strip(b"\r\n"))
        self._lines = self._line(lines, len(lines))

    def _line(self, lines: bytes, place: int) -> int:
        """Of a place in `lines`, which end in LF, in CR or in both."""
        return self._lines + max(lines.count(b"\n", 0, place), lines.count(b"\r", 0, place))

    def _names_in_quotes(self, lines: bytes) -> bool:
        header = lines.lstrip(b"\r\n").partition(b"\n")[0].partition(b"\r")[0]
        return any(_CLOSED.fullmatch(name) for name in header.split(self._mark))

    def _place_of_open(self, lines: bytes) -> int | None:
        place = 0
        while (place := self._end(self._known, lines, place)) < len(lines):
            closed = _CLOSED.match(lines, place)
            if closed is None:
                return place
            behind = self._end(self._behind, lines, closed.end())
            if behind == closed.end():
                self.enclosed = True
                self.meant = self.meant or self._is_meant(closed[0])
            elif self.loose_line is None:
                self.loose_line = self._line(lines, place)
            place = behind
        return None

    @property
    def _known(self) -> re.Pattern[bytes]:
        if self.meant and self.enclosed:
            return self._any
        return self._simple if self.enclosed else self._plain

    def _is_meant(self, value: bytes) -> bool:
        """Whether it holds what has to be in quotes. A delimiter with a line break shows nothing: they may be all that
        lies between a quote in one row and a quote in the next."""
        if b'""' in value[1:-1]:
            return True
        return (self._mark in value) != (b"\n" in value or b"\r" in value)

    @staticmethod
    def _end(pattern: re.Pattern[bytes], lines: bytes, place: int) -> int:
        found = pattern.match(lines, place)
        return found.end() if found else place
