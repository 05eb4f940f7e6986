"""What a TIFF promises beyond the size of its picture: the size of its tiles, each of which is decoded whole."""

import contextlib
import struct
from collections.abc import Iterator

_BIG = 43
_WIDTH, _LENGTH = 322, 323
# Whole numbers by the type of an entry; signed ones are read as unsigned, since no tile has a negative side.
_FORMATS = {1: "B", 3: "H", 4: "I", 6: "B", 8: "H", 9: "I", 13: "I", 16: "Q", 17: "Q", 18: "Q"}


def tile_pixels(data: bytes) -> int:
    """Pixels of a tile of the first picture in `data`, a TIFF that Pillow has opened; 0 where it has no tiles.

    Read from the file itself: of a tag that stands there twice Pillow takes the last, libtiff the first. The largest
    counts here. What lies beyond the end of the file is left out: libtiff cannot read it either.
    """
    sides = {_WIDTH: 0, _LENGTH: 0}
    with contextlib.suppress(struct.error):
        for tag, value in _sides(data):
            sides[tag] = max(sides[tag], value)
    return sides[_WIDTH] * sides[_LENGTH]


def _sides(data: bytes) -> Iterator[tuple[int, int]]:
    """Tag and value of every entry of the first directory that is a side of a tile."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == _BIG
    word, count, room = (order + "Q", order + "Q", 8) if big else (order + "I", order + "H", 4)
    (start,) = struct.unpack_from(word, data, 8 if big else 4)
    (entries,) = struct.unpack_from(count, data, start)
    first, step = start + struct.calcsize(count), 4 + 2 * room
    for place in range(first, first + entries * step, step):
        tag, kind = struct.unpack_from(order + "HH", data, place)
        if tag not in {_WIDTH, _LENGTH} or kind not in _FORMATS:
            continue
        (many,) = struct.unpack_from(word, data, place + 4)
        at = place + 4 + room
        if many * struct.calcsize(_FORMATS[kind]) > room:
            (at,) = struct.unpack_from(word, data, at)
        yield tag, struct.unpack_from(order + _FORMATS[kind], data, at)[0]
