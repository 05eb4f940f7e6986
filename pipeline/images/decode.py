"""Bytes of an image file to uint8 RGB of the model's size, or an ImageError of stage `decode`.

The header is read and checked before any memory is spent on pixels. Pillow decides what a file is and whether it is
whole; simplejpeg decodes the JPEGs of which it gives exactly Pillow's pixels, straight into memory that Pillow
resizes in place.
"""

import contextlib
import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image, UnidentifiedImageError

from pipeline.images import boxes
from pipeline.images.failures import decode_failure, not_an_image, too_many_pixels
from pipeline.images.jpeg import decode_jpeg, refuse_early_end, refuse_endless_scans, scale_denominator
from pipeline.images.limits import DECODE_LIMIT_S, DecodeTimeoutError, quiet_stderr, time_limit
from pipeline.images.tiff import tile_pixels
from pipeline.images.transform import Box, Pixels, resize_and_crop, resized_size
from pipeline.modes import to_rgb
from pipeline.picture_formats import FORMATS
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
# Those that bring the right or the bottom of the stored picture to the left, and those that bring one to the top.
_TO_THE_LEFT = frozenset({2, 3, 6, 7})
_TO_THE_TOP = frozenset({3, 4, 7, 8})
_JPEG_FORMATS = frozenset({"JPEG", "MPO"})


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Size as a viewer shows it, in pixels, and Pillow's name of the format."""

    width: int
    height: int
    format: str


@dataclass(frozen=True, slots=True)
class DecodeSpec:
    """How a picture is decoded: into what, exactly or fast, and up to which size."""

    preprocessing: Preprocessing
    mode: DecodeMode
    max_pixels: int
    limit_s: float = DECODE_LIMIT_S


def decode_into(data: bytes, out: Pixels, spec: DecodeSpec) -> ImageFacts:
    """Decode `data` into `out`, uint8 of shape (height, width, 3) as `spec.preprocessing` asks.

    Raises ImageError, and nothing else, whatever the bytes are. Call `formats.prepare_process` before.
    """
    try:
        with time_limit(spec.limit_s):
            image = _open(data, spec.max_pixels)
            return _decode_opened(image, data, out, spec)
    except ImageError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a hostile header makes them raise
        raise decode_failure(error, data) from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    boxes.refuse_early_end(data)
    # Half, because Pillow refuses from twice its limit on; it looks inside icons, where we cannot.
    Image.MAX_IMAGE_PIXELS = max_pixels // 2
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise not_an_image(data) from error
    width, height = image.size
    if width * height > max_pixels:
        raise too_many_pixels(f"{image.format} of {width} × {height} pixels; the limit is {max_pixels:,}")
    if width < 1 or height < 1:
        raise ImageError("decode", "EmptyImage", f"{image.format} of {width} × {height} pixels holds no picture")
    tile = tile_pixels(data) if image.format == "TIFF" else 0
    if tile > max_pixels:
        raise too_many_pixels(f"TIFF with tiles of {tile:,} pixels; the limit is {max_pixels:,}")
    return image


def _decode_opened(image: Image.Image, data: bytes, out: Pixels, spec: DecodeSpec) -> ImageFacts:
    name = image.format or "unknown"
    if name in _JPEG_FORMATS:
        refuse_endless_scans(image, data)
    picture, denominator, orientation = None, 1, 1
    if name in _JPEG_FORMATS and image.mode in {"RGB", "L"}:
        orientation = _orientation(image)
        if spec.mode == "fast":
            denominator = _jpeg_scale(image.size, orientation, spec.preprocessing)
        picture = decode_jpeg(data, image.size, denominator)
    if picture is None:
        denominator = 1
        if name in _JPEG_FORMATS and image.mode == "CMYK":
            refuse_early_end(data)
        with quiet_stderr() if name == "TIFF" else contextlib.nullcontext():
            image.load()
        picture = to_rgb(image)
        orientation = _orientation(image)  # after loading: a PNG may end with it, a TIFF is upright by now
    width, height = _upright(image.size, orientation)
    if orientation in _TURNS:
        picture = picture.transpose(_TURNS[orientation])
    target = resized_size(width, height, spec.preprocessing)
    box = _box(picture.size, (width / denominator, height / denominator), orientation)
    resize_and_crop(picture, box, target, spec.preprocessing, out)
    return ImageFacts(width, height, name)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. A broken EXIF block says nothing about the pixels: upright then."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except DecodeTimeoutError:
        raise
    except Exception:  # noqa: BLE001  hostile bytes, parsed by Python code that checks little
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _jpeg_scale(size: tuple[int, int], orientation: int, preprocessing: Preprocessing) -> int:
    target = resized_size(*_upright(size, orientation), preprocessing)
    return scale_denominator(size, _upright(target, orientation))


def _box(size: tuple[int, int], extent: tuple[float, float], orientation: int) -> Box:
    """Where the picture lies in `size` upright pixels. A scaled decode fills up the last column and row as they are
    stored, and turning moves these."""
    left = size[0] - extent[0] if orientation in _TO_THE_LEFT else 0
    top = size[1] - extent[1] if orientation in _TO_THE_TOP else 0
    return left, top, left + extent[0], top + extent[1]


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if orientation in _SIDEWAYS else size
