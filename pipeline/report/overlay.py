"""A map of weights laid over a picture, as a PNG."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SMALLEST_SIDE = 384
# Dark to bright with steadily growing lightness, so that it also reads without colour: (share, red, green, blue).
_COLOURS = np.array(
    [(0.0, 10, 8, 40), (0.25, 75, 20, 110), (0.5, 180, 45, 85), (0.75, 240, 130, 30), (1.0, 252, 250, 170)]
)


def overlay_png(picture: NDArray[np.uint8], weights: NDArray[np.float32]) -> bytes:
    """`picture` (H, W, 3), the brighter and the more in colour where `weights` (rows, columns) are large.

    Weights are scaled from their least to their largest; small pictures are enlarged.
    """
    height, width, _ = picture.shape
    scale = max(1, -(-_SMALLEST_SIDE // min(height, width)))
    size = (width * scale, height * scale)
    base = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC), np.float32)
    span = float(weights.max() - weights.min())
    shares = (weights - weights.min()) / span if span > 0 else np.zeros_like(weights)
    heat = Image.fromarray(shares.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    level = np.asarray(heat, np.float32).clip(0, 1)
    coloured = np.stack([np.interp(level, _COLOURS[:, 0], _COLOURS[:, channel]) for channel in (1, 2, 3)], axis=-1)
    grey = base.mean(axis=-1, keepdims=True)
    mixed = 0.45 * (0.5 * base + 0.5 * grey) + 0.55 * coloured
    buffer = io.BytesIO()
    Image.fromarray(mixed.round().astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
