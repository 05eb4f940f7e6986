"""Every pixel mode of Pillow to 8-bit RGB, as a viewer on a white page would show it.

The common modes (1, L, P, RGB, RGBA, LA, CMYK, YCbCr) give exactly what the reference image processors give.
Colour profiles are ignored, as they do. `docs/images.md` holds the table.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

_WIDE_MODES = frozenset({"I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
_BITS_PER_SAMPLE_TAG = 258
_PHOTOMETRIC_TAG = 262
_STRIP_PIXELS = 4_000_000


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode to mode RGB. Alpha and transparent colours are composited on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _WIDE_MODES:
        return _wide_to_rgb(image)
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Composite in strips: whole, the two RGBA intermediates of a 100-megapixel picture would take 800 MB."""
    if image.mode in {"La", "RGBa"}:
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    result = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        strip = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return result


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
    converted = ImageCms.applyTransform(image, transform)
    if converted is None:
        raise ValueError("conversion from Lab gave no picture")
    return converted


def _wide_to_rgb(image: Image.Image) -> Image.Image:
    """One channel of 16 bits, 32 bits or floats to grey, by the range that its values are meant to have."""
    low, high = _value_range(image)
    scale = 255.0 / (high - low)
    # WhiteIsZero (TIFF 6.0, section 4): Pillow turns it round at up to 8 bits, and hands wider values over as they are.
    white_is_zero = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == 0
    result = Image.new("L", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        with np.errstate(all="ignore"):  # a damaged file may hold any bit pattern
            values = np.asarray(image.crop(box), dtype=np.float64)
            if white_is_zero:
                values = low + high - values
            values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
            grey = np.rint((values - low) * scale).clip(0, 255).astype(np.uint8)
        result.paste(Image.fromarray(grey), box)
    return result.convert("RGB")


def _value_range(image: Image.Image) -> tuple[float, float]:
    """Black and white point. 16 bits span their bit depth; integers and floats the narrowest usual range that fits.

    Floats in [0, 1] and integers in [0, 255] or [0, 65535] keep their meaning; anything else is stretched from its
    least to its largest value, for no range is declared in the file.
    """
    if image.mode.startswith("I;16"):
        return 0.0, float(2 ** _tiff_bits(image) - 1)
    low, high = _extrema(image)
    tops = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    if low >= 0:
        for top in tops:
            if high <= top:
                return 0.0, top
    return (low, high) if high > low else (low, low + 1.0)


def _tiff_bits(image: Image.Image) -> int:
    """Bits of a sample: 16, or what a TIFF of 9 to 15 bits declares."""
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE_TAG, (16,))
    first = bits[0] if isinstance(bits, tuple) else bits
    return int(first) if 8 < first < 16 else 16


def _extrema(image: Image.Image) -> tuple[float, float]:
    values: NDArray[np.float64] = np.asarray(image, dtype=None)
    finite = values[np.isfinite(values)] if image.mode == "F" else values
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
