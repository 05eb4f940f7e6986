"""Resize and centre crop to the model's size, equal bit for bit to the reference image processors.

The reference is the Pillow backend of the Hugging Face image processors: `Image.resize` on uint8, without
`reducing_gap`, then a centre crop that pads with black where the picture is smaller than the crop.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.preprocessing import Preprocessing

Pixels = NDArray[np.uint8]
# Left, top, right and bottom in pixels, fractions included.
Box = tuple[float, float, float, float]

# Above this many pixels an intermediate (a 1 × 60,000 strip whose short edge is to become 256) would take
# gigabytes; only the part that the crop keeps is computed then.
MAX_INTERMEDIATE_PIXELS = 50_000_000


def resized_size(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height after the resize and before the crop.

    With `shortest_edge`, the longer edge is `int(shortest_edge * long / short)`: truncated, never rounded. With
    `cover`, both are rounded, as timm's evaluation transform does it for a crop that is not square.
    """
    if preprocessing.resize is not None:
        return preprocessing.resize[1], preprocessing.resize[0]
    if preprocessing.cover is not None:
        ratio = min(height / preprocessing.cover[0], width / preprocessing.cover[1])
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    edge = preprocessing.shortest_edge
    if edge is None:
        return width, height
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def resize_and_crop(
    image: Image.Image, box: Box, size: tuple[int, int], preprocessing: Preprocessing, out: Pixels
) -> None:
    """Write `image` (mode RGB, upright) into `out`, uint8 of shape (height, width, 3).

    The picture takes up `box` of `image`: all of it, or a fraction of a pixel less when it was decoded at a smaller
    scale. `size` is its width and height after the resize.
    """
    resample = Image.Resampling(preprocessing.resample)
    if preprocessing.crop is not None and size[0] * size[1] > MAX_INTERMEDIATE_PIXELS:
        image = _resize_window(image, box, size, preprocessing, resample)
    elif size != image.size or box != (0, 0, *image.size):
        image = image.resize(size, resample, box=box)
    pixels = np.asarray(image)
    if pixels.shape == out.shape:
        out[:] = pixels
    else:
        _centre_crop(pixels, out, preprocessing)


def _resize_window(
    image: Image.Image,
    box: Box,
    size: tuple[int, int],
    preprocessing: Preprocessing,
    resample: Image.Resampling,
) -> Image.Image:
    """Resize only what the centre crop keeps of the picture scaled to `size`."""
    height, width = preprocessing.output_size
    kept = min(size[0], width), min(size[1], height)
    left, top = (_margin(size[axis] - kept[axis], preprocessing) for axis in (0, 1))
    scale_x, scale_y = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]
    right, bottom = left + kept[0], top + kept[1]
    window = (box[0] + left * scale_x, box[1] + top * scale_y, box[0] + right * scale_x, box[1] + bottom * scale_y)
    return image.resize(kept, resample, box=window)


def _centre_crop(source: Pixels, out: Pixels, preprocessing: Preprocessing) -> None:
    rows, columns = (_spans(source.shape[axis], out.shape[axis], preprocessing) for axis in (0, 1))
    if source.shape[0] < out.shape[0] or source.shape[1] < out.shape[1]:
        out[:] = 0
    out[rows[1], columns[1]] = source[rows[0], columns[0]]


def _margin(spare: int, preprocessing: Preprocessing) -> int:
    """Pixels cut off in front of a centre crop, of `spare` in all."""
    return round(spare / 2) if preprocessing.crop_rounding == "even" else spare // 2


def _spans(size: int, crop: int, preprocessing: Preprocessing) -> tuple[slice, slice]:
    """Where a centre crop reads and where it writes, along one axis. An odd margin of padding is larger in front."""
    if size >= crop:
        start = _margin(size - crop, preprocessing)
        return slice(start, start + crop), slice(0, crop)
    start = (crop - size + 1) // 2
    return slice(0, size), slice(start, start + size)
