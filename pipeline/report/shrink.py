"""From a picture's bytes to a small WebP to look at. Looks only: no model ever sees these pixels."""

import io
import os
import threading
from contextlib import nullcontext

from PIL import Image, ImageOps

from pipeline.modes import to_rgb
from pipeline.picture_formats import FORMATS, register_heif
from schemas.errors import SourceError

_LARGE_PIXELS = 16_000_000
_large = threading.Lock()
_decoders = threading.BoundedSemaphore(min(8, os.cpu_count() or 1))


def shrink(data: bytes | None, side: int, max_pixels: int) -> bytes:
    """WebP of at most `side` pixels a side: orientation applied, first frame, formats and colours as the job has them.

    Large pictures are decoded one at a time, so that many threads do not add up to much memory. Raises SourceError
    for no bytes or too many pixels, else whatever Pillow raises for what is no picture.
    """
    if not data:
        raise SourceError("the picture is empty")
    register_heif()
    with _decoders, Image.open(io.BytesIO(data), formats=FORMATS) as image:
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise SourceError(f"{image.width}×{image.height} pixels exceed the limit of {max_pixels}")
        image.draft("RGB", (side * 2, side * 2))
        with _large if image.width * image.height > _LARGE_PIXELS else nullcontext():
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            small = to_rgb(image)
            small.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
            return _webp(small)


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=72, method=2)
    return buffer.getvalue()
