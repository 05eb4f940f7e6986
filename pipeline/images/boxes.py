"""Whether a HEIC or AVIF is all there: each of its boxes says how long it is (ISO/IEC 14496-12, 4.2).

libheif leaves the tiles that it does not find black, in silence.
"""

import struct
from collections.abc import Iterator

from pipeline.images.failures import is_heic_or_avif, truncated

# The boxes that a picture is in. Cameras put others behind them, and trailers that are no boxes at all.
_NEEDED = frozenset({b"ftyp", b"meta", b"moov", b"mdat"})
_HEAD_BYTES = 8


def refuse_early_end(data: bytes) -> None:
    """Raise ImageError `Truncated` for a HEIC or AVIF that ends before its boxes do; other files pass."""
    if not is_heic_or_avif(data):
        return
    for kind, end in _boxes(data):
        if kind in _NEEDED and end > len(data):
            raise truncated(f"its box `{kind.decode()}` goes up to byte {end:,}, the file has {len(data):,}")


def _boxes(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Kind and end of each box of the file, up to one that goes up to the file's own end or begins another file."""
    start = 0
    while start + _HEAD_BYTES <= len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        if size == 1 and start + 2 * _HEAD_BYTES <= len(data):
            (size,) = struct.unpack_from(">Q", data, start + _HEAD_BYTES)
        if size < _HEAD_BYTES or (kind == b"ftyp" and start):
            return
        yield kind, start + size
        start += size
