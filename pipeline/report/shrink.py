"""From a picture's bytes to a small WebP to look at. Looks only: no model ever sees these pixels."""

import functools
import io
import os
import threading
from contextlib import nullcontext

import numpy as np
from PIL import Image, ImageOps

from schemas.errors import SourceError

_LARGE_PIXELS = 16_000_000
_large = threading.Lock()
_decoders = threading.BoundedSemaphore(min(8, os.cpu_count() or 1))


def shrink(data: bytes | None, side: int, max_pixels: int) -> bytes:
    """WebP of at most `side` pixels a side: orientation applied, first frame, transparency on white.

    Large pictures are decoded one at a time, so that many threads do not add up to much memory. Raises SourceError
    for no bytes or too many pixels, else whatever Pillow raises for what is no picture.
    """
    if not data:
        raise SourceError("the picture is empty")
    _register_heif()
    with _decoders, Image.open(io.BytesIO(data)) as image:
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise SourceError(f"{image.width}×{image.height} pixels exceed the limit of {max_pixels}")
        image.draft("RGB", (side * 2, side * 2))
        with _large if image.width * image.height > _LARGE_PIXELS else nullcontext():
            ImageOps.exif_transpose(image, in_place=True)
            small = _displayable(image)
            small.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
            return _webp(_on_white(small))


@functools.cache
def _register_heif() -> None:
    from pi_heif import register_heif_opener

    register_heif_opener()


def _displayable(image: Image.Image) -> Image.Image:
    """`image` in a mode of eight bits a channel that can be resized; palettes resolved, wide gray levels scaled."""
    if image.mode in {"RGB", "RGBA", "L", "LA"} and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        levels = np.asarray(image, np.float32)
        span = 65_535.0 if image.mode.startswith("I") else max(1.0, float(np.nanmax(levels, initial=1.0)))
        return Image.fromarray((np.nan_to_num(levels / span).clip(0, 1) * 255).astype(np.uint8))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode not in {"RGBA", "LA"}:
        return image.convert("RGB")
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return flat


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=72, method=2)
    return buffer.getvalue()
