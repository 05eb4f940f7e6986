"""Bytes of an image file to uint8 RGB of the model's size, or an ImageError of stage `decode`.

The header is read and checked before any memory is spent on pixels. Pillow decides what a file is and whether it is
whole; simplejpeg decodes the JPEGs of which it gives exactly Pillow's pixels, straight into memory that Pillow
resizes in place.
"""

import io
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.images.failures import decode_failure, not_an_image
from pipeline.images.formats import FORMATS
from pipeline.images.modes import to_rgb
from pipeline.images.transform import Pixels, resize_and_crop
from schemas.errors import ImageError
from schemas.preprocessing import Preprocessing

DecodeMode = Literal["exact", "fast"]
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = frozenset({5, 6, 7, 8})
_JPEG_FORMATS = frozenset({"JPEG", "MPO"})


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Size as a viewer shows it, in pixels, and Pillow's name of the format."""

    width: int
    height: int
    format: str


def decode_into(
    data: bytes, out: Pixels, *, preprocessing: Preprocessing, mode: DecodeMode, max_pixels: int
) -> ImageFacts:
    """Decode `data` into `out`, uint8 of shape (height, width, 3) as `preprocessing` asks.

    Raises ImageError, and nothing else, whatever the bytes are.
    """
    try:
        image = _open(data, max_pixels)
        return _decode_opened(image, data, out, preprocessing, mode)
    except ImageError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a hostile header makes them raise
        raise decode_failure(error, data) from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise not_an_image(data) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            "decode",
            "TooManyPixels",
            f"{image.format} of {width} × {height} pixels; the limit is {max_pixels:,} (fetch.max_pixels)",
        )
    if width < 1 or height < 1:
        raise ImageError("decode", "EmptyImage", f"{image.format} of {width} × {height} pixels holds no picture")
    return image


def _decode_opened(
    image: Image.Image, data: bytes, out: Pixels, preprocessing: Preprocessing, mode: DecodeMode
) -> ImageFacts:
    name = image.format or "unknown"
    is_jpeg = name in _JPEG_FORMATS and image.mode in {"RGB", "L"}
    if is_jpeg:
        size = image.size
        picture = _jpeg_pixels(image, data)
    else:
        image.load()  # a TIFF is turned upright here, so its size and its orientation are read afterwards
        size = image.size
        picture = to_rgb(image)
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    if orientation in _TURNS:
        picture = picture.transpose(_TURNS[orientation])
    resize_and_crop(picture, preprocessing, out)
    width, height = reversed(size) if orientation in _SIDEWAYS else size
    return ImageFacts(width, height, name)


def _jpeg_pixels(image: Image.Image, data: bytes) -> Image.Image:
    """Mode RGB, identical to Pillow's. Where simplejpeg has the least doubt, Pillow is asked."""
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGBX")
    except ValueError as error:
        if "premature end" in str(error):
            raise ImageError("decode", "Truncated", f"the picture ends early: {error}") from error
        image.load()
        return to_rgb(image)
    if (pixels.shape[1], pixels.shape[0]) != image.size:
        image.load()
        return to_rgb(image)
    # Pillow keeps RGB in four bytes a pixel, so this memory becomes an image without a copy.
    return Image.fromarrow(pa.array(pixels.reshape(-1)), "RGB", image.size)
