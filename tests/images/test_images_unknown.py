"""What the row of a file says that no decoder opens, though nothing is wrong with it."""

import io
import struct

import numpy as np
import pytest
from PIL import Image
from support.odd_images import LONG, SHORT

from pipeline.images.decode import DecodeSpec, decode_into
from pipeline.images.formats import prepare_process
from schemas.errors import ImageError
from schemas.preprocessing import Preprocessing

pytestmark = pytest.mark.timeout(60)
FLOAT = 3


def error_of(data: bytes) -> ImageError:
    prepare_process()
    spec = DecodeSpec(Preprocessing(resize=(8, 8)), "exact", 1_000_000)
    with pytest.raises(ImageError) as caught:
        decode_into(data, np.empty((8, 8, 3), np.uint8), spec)
    return caught.value


def tiff(bands: int, bits: int, sample: int = 1, *, big: bool = False) -> bytes:
    """A whole TIFF of 4 × 4 pixels."""
    per_band = [(258, SHORT, [bits] * bands), (339, SHORT, [sample] * bands)]
    body = bytes(4 * 4 * bands * bits // 8)
    single = [(256, 4), (257, 4), (259, 1), (262, 2 if bands == 3 else 1), (277, bands), (278, 4), (279, len(body))]
    tags = sorted([*per_band, *((tag, LONG, [value]) for tag, value in single), (273, LONG, [0])])
    head, entry, room = ("<2sHHHQQ", "<HHQ", 8) if big else ("<2sHIH", "<HHI", 4)
    behind = struct.calcsize(head) + len(tags) * (4 + 2 * room) + room
    values = [struct.pack(f"<{len(v)}{'H' if kind == SHORT else 'I'}", *v) for _, kind, v in tags]
    start = behind + sum(len(value) for value in values if len(value) > room)
    entries, long = b"", b""
    for (tag, kind, given), value in zip(tags, values, strict=True):
        value = struct.pack("<I", start) if tag == 273 else value
        if len(value) > room:
            value, long = struct.pack("<Q", behind + len(long)), long + value
        entries += struct.pack(entry, tag, kind, len(given)) + value[:room].ljust(room, b"\0")
    first = struct.pack(head, b"II", 43, 8, 0, 16, len(tags)) if big else struct.pack(head, b"II", 42, 8, len(tags))
    return first + entries + bytes(room) + long + body


@pytest.mark.parametrize("big", [False, True])
def test_the_tiffs_of_this_test_are_whole(big: bool) -> None:
    for bands, mode in ((1, "L"), (3, "RGB")):
        image = Image.open(io.BytesIO(tiff(bands, 8, big=big)))
        image.load()
        assert (image.mode, image.size) == (mode, (4, 4))


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(("bands", "bits", "sample"), [(13, 16, 1), (3, 32, FLOAT), (1, 64, FLOAT)])
def test_a_tiff_of_pixels_that_are_not_decoded_is_not_only_called_damaged(
    bands: int, bits: int, sample: int, big: bool
) -> None:
    data = tiff(bands, bits, sample, big=big)
    error = error_of(data)
    assert error.error == "Corrupt"
    assert "damaged, cut short, or of a kind of pixels that is not decoded" in str(error)
    assert f"({len(data):,} bytes)" in str(error)


@pytest.mark.parametrize("head", ["ff0a", "0000000c4a584c20 0d0a870a"])
def test_jpeg_xl_is_called_by_its_name(head: str) -> None:
    error = error_of(bytes.fromhex(head) + bytes(range(1, 40)))
    assert error.error == "NotAnImage"
    assert "JPEG XL, which is not decoded" in str(error)
