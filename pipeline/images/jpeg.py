"""JPEG pixels through simplejpeg: Pillow's own, bit for bit, faster, and at a smaller scale where asked."""

import math
import threading

import numpy as np
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.images.failures import truncated
from schemas.errors import ImageError

# Scales at which libjpeg-turbo's inverse DCT is both exact in geometry and vectorised.
_DENOMINATORS = (8, 4, 2)
# Encoders write about ten; each costs a pass over all coefficients, and a file of thousands keeps a decoder busy for
# hours. The limit that libjpeg-turbo's own tools take against such files.
_MAX_SCANS = 500
# What a thread keeps for its next picture: one of 16 megapixels.
_KEPT_BYTES = 64 << 20


def scale_denominator(size: tuple[int, int], target: tuple[int, int]) -> int:
    """The largest of 8, 4, 2 by which `size` (width, height) can be divided without falling below `target`, else 1."""
    for denominator in _DENOMINATORS:
        if size[0] >= denominator * target[0] and size[1] >= denominator * target[1]:
            return denominator
    return 1


def refuse_endless_scans(image: Image.Image, data: bytes) -> None:
    """Raise ImageError `Corrupt` for an opened JPEG that is made to keep decoders busy."""
    scans = data.count(b"\xff\xda") if "progressive" in image.info else 1
    if scans > _MAX_SCANS:
        raise ImageError(
            "decode", "Corrupt", f"a progressive JPEG of {scans:,} scans; at most {_MAX_SCANS} are decoded"
        )


def decode_jpeg(data: bytes, size: tuple[int, int], denominator: int) -> Image.Image | None:
    """A picture of `size` (width, height), divided by `denominator`, in mode RGB. It is whole until this thread decodes
    another: copy what is to stay.

    None where simplejpeg has the least doubt about the file: Pillow shall decide then. Raises ImageError
    `Truncated` for a file whose scan ends early, which Pillow would fill up with grey in silence.
    """
    width, height = (math.ceil(side / denominator) for side in size)
    least = {"min_height": height, "min_width": width} if denominator > 1 else {}
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGBX", **least, buffer=_scratch(4 * width * height))
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise truncated(str(error)) from error
        return None
    if pixels.shape[:2] != (height, width):
        return None
    # Pillow keeps RGB in four bytes a pixel, so this memory becomes an image without a copy.
    return Image.fromarrow(pa.array(pixels.reshape(-1)), "RGB", (width, height))


class _Kept(threading.local):
    pixels: NDArray[np.uint8] = np.empty(0, np.uint8)


_KEPT = _Kept()


def _scratch(count: int) -> NDArray[np.uint8]:
    """At least `count` bytes, where that is possible those of this thread's picture before: new ones are mapped page by
    page, for a sixth of the time that a picture of 0.8 megapixels takes and a twentieth at 12."""
    if count > _KEPT_BYTES:
        return np.empty(count, np.uint8)
    if count > len(_KEPT.pixels):
        _KEPT.pixels = np.empty(0, np.uint8)  # so that there are never two
        _KEPT.pixels = np.empty(count, np.uint8)
    return _KEPT.pixels


def refuse_early_end(data: bytes) -> None:
    """Raise ImageError `Truncated` for a CMYK file whose scan ends early: Pillow decides about its colours, but would
    fill up what is missing in silence."""
    try:
        simplejpeg.decode_jpeg(data, "CMYK", min_height=1, min_width=1)  # an eighth of the size: quick
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise truncated(str(error)) from error
