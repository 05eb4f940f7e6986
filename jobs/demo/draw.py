"""Labelled pictures drawn by code: one coloured shape on a quiet background, and a few broken files.

The label is `<colour> <shape>`. Everything else varies and says nothing about the label: the size of the picture and
its aspect ratio, where the shape lies, how large, turned and stretched it is, the texture of shape and background,
shadow, light, blur and noise. All of it comes from one numpy Generator, so a seed gives the same pictures again.
"""

import colorsys
import io
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter

# colour: hue in degrees, how far the hue may stray, lowest value (dark yellow would be brown)
_COLOURS: Final[dict[str, tuple[float, float, float]]] = {
    "red": (0, 7, 0.70),
    "yellow": (51, 5, 0.88),
    "green": (130, 14, 0.50),
    "blue": (217, 10, 0.65),
    "purple": (287, 9, 0.55),
}
_SHAPES: Final = ("circle", "ring", "triangle", "square", "star")
_TEXTURES: Final = ("plain", "gradient", "stripes", "checks", "dots", "clouds")

CLASSES: Final[tuple[str, ...]] = tuple(f"{colour} {shape}" for colour in _COLOURS for shape in _SHAPES)

_SHORTEST_PX, _LONGEST_PX = 160, 640
_LARGEST_ASPECT = 1.6
_SUPERSAMPLING = 3
_PATTERN_PX = 192  # patterns are computed on a grid no larger than this, then enlarged
_NOISE_TILE_PX = 96
_RING_HOLE = 0.52

Colour = tuple[int, int, int]


def draw(class_index: int, rng: np.random.Generator) -> Image.Image:
    """An RGB picture of `CLASSES[class_index]`, 160 to 640 pixels a side; advances `rng`."""
    colour, shape = CLASSES[class_index].split()
    width, height = _picture_size(rng)
    picture = _background(width, height, rng)
    _place_shape(picture, shape, colour, rng)
    picture = ImageChops.multiply(picture, _light(width, height, rng))
    if rng.random() < 0.25:
        picture = picture.filter(ImageFilter.BoxBlur(rng.uniform(0.002, 0.008) * min(width, height)))
    return _with_noise(picture, rng)


def _picture_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height: sides log-uniform, aspect ratio within 1.6, either way up."""
    long_side = math.exp(rng.uniform(math.log(_SHORTEST_PX), math.log(_LONGEST_PX)))
    short_side = max(_SHORTEST_PX, long_side / math.exp(rng.uniform(0, math.log(_LARGEST_ASPECT))))
    sides = (round(long_side), round(short_side))
    return sides if rng.random() < 0.5 else (sides[1], sides[0])


def _hsv(hue_degrees: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue_degrees / 360 % 1, min(saturation, 1), min(value, 1))
    return round(red * 255), round(green * 255), round(blue * 255)


def _pattern(kind: str, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """An L picture that says how much of the second of two tones each pixel takes."""
    if kind == "plain":
        return Image.new("L", (width, height), 0)
    if kind == "clouds":
        coarse = rng.integers(0, 256, (int(rng.integers(4, 9)), int(rng.integers(4, 9))), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    shrink = max(1.0, max(width, height) / _PATTERN_PX)
    columns, rows = round(width / shrink), round(height / shrink)
    angle, period = rng.uniform(0, math.pi), rng.uniform(0.11, 0.26) * min(columns, rows)
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    along = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period)
    across = (y * math.cos(angle) - x * math.sin(angle)) * (2 * math.pi / period)
    edge = period / (2 * math.pi)  # makes a transition about a pixel wide, whatever the period
    if kind == "gradient":
        weight = (along - along.min()) / np.ptp(along)
    elif kind == "stripes":
        weight = edge * (np.sin(along) + rng.uniform(-0.4, 0.4)) + 0.5
    elif kind == "checks":
        weight = edge * np.sin(along) * np.sin(across) + 0.5
    else:
        weight = edge * (np.sin(along) + np.sin(across) - rng.uniform(0.7, 1.1)) + 0.5
    grey = (np.clip(weight, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR)


def _two_tones(first: Colour, second: Colour, pattern: Image.Image) -> Image.Image:
    """Replaces the grey levels of `pattern` by the way from one colour to the other."""
    weight = np.linspace(0, 1, 256)[:, None]
    palette = np.round(np.array(first) * (1 - weight) + np.array(second) * weight).astype(np.uint8)
    pattern.putpalette(palette.tobytes())
    return pattern.convert("RGB")


def _background(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Two close, pale or dark tones of any hue: never as saturated as a shape, so that the label stays certain."""
    hue, saturation = rng.uniform(0, 360), rng.uniform(0.04, 0.26)
    pale = rng.random() < 0.7
    value = rng.uniform(0.84, 1.0) if pale else rng.uniform(0.20, 0.36)
    step = rng.uniform(0.05, 0.15) * (-1 if pale else 1)
    first = _hsv(hue, saturation, value)
    second = _hsv(hue + rng.uniform(-25, 25), saturation * rng.uniform(0.6, 1.3), value + step)
    return _two_tones(first, second, _pattern(str(rng.choice(_TEXTURES)), width, height, rng))


def _outline(shape: str) -> npt.NDArray[np.float64]:
    """Corners (N, 2) of an upright shape inside the unit circle, y down; a ring gets its hole when it is filled."""
    if shape in ("circle", "ring"):
        return _on_circle(72, np.ones(72))
    if shape == "star":
        return _on_circle(10, np.tile([1.0, 0.42], 5))
    if shape == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * math.sqrt(0.5)
    return _on_circle(3, np.ones(3))


def _on_circle(count: int, radius: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    angle = np.arange(count) * (2 * math.pi / count) - math.pi / 2  # the first corner on top
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _shape_mask(shape: str, side_px: int, rng: np.random.Generator) -> Image.Image:
    """An antialiased L mask, `side_px` square, of the shape turned and slightly stretched."""
    turn, stretch_way, stretch = rng.uniform(-0.5, 0.5), rng.uniform(0, math.pi), rng.uniform(0.86, 1.0)
    cos, sin = math.cos(stretch_way), math.sin(stretch_way)
    axes = np.array([[cos, -sin], [sin, cos]])
    spin = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    corners = _outline(shape) @ spin @ axes @ np.diag([1.0, stretch]) @ axes.T
    centre = side_px * _SUPERSAMPLING / 2
    mask = Image.new("L", (side_px * _SUPERSAMPLING,) * 2, 0)
    pen = ImageDraw.Draw(mask)
    for scale, fill in ((0.97, 255), (_RING_HOLE, 0)) if shape == "ring" else ((0.97, 255),):
        pen.polygon([(float(x), float(y)) for x, y in corners * (scale * centre) + centre], fill=fill)
    return mask.reduce(_SUPERSAMPLING)


def _place_shape(picture: Image.Image, shape: str, colour: str, rng: np.random.Generator) -> None:
    """Puts the filled shape, whole, somewhere on the picture; most have a soft shadow."""
    side_px = round(min(picture.size) * rng.uniform(0.45, 0.9))
    left, top = (int(rng.integers(0, length - side_px + 1)) for length in picture.size)
    mask = _shape_mask(shape, side_px, rng)
    if rng.random() < 0.6:
        shift_x, shift_y = (round(side_px * rng.uniform(-0.06, 0.06)) for _ in range(2))
        shadow = mask.filter(ImageFilter.BoxBlur(side_px * 0.03)).point([level * 2 // 5 for level in range(256)])
        picture.paste((0, 0, 0), (left + shift_x, top + shift_y), shadow)
    hue, hue_range, lowest_value = _COLOURS[colour]
    hue += rng.uniform(-hue_range, hue_range)
    saturation, value = rng.uniform(0.84, 1.0), rng.uniform(lowest_value, 1.0)
    if rng.random() < 0.5:
        second = _hsv(hue, saturation, value * rng.uniform(0.62, 0.8))
    else:
        second = _hsv(hue, saturation * rng.uniform(0.62, 0.8), value + 0.2)
    pattern = _pattern(str(rng.choice(_TEXTURES)), side_px, side_px, rng)
    picture.paste(_two_tones(_hsv(hue, saturation, value), second, pattern), (left, top), mask)


def _light(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Uneven, slightly tinted light, to be multiplied onto the picture."""
    strength = rng.uniform(0.84, 1.0) * rng.uniform(0.86, 1.0, (3, 3, 1)) * rng.uniform(0.95, 1.0, 3)
    coarse = Image.fromarray((strength * 255).astype(np.uint8))
    return coarse.resize((width, height), Image.Resampling.BILINEAR)


def _with_noise(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian sensor noise; one tile is repeated, because drawing it for every pixel costs more than the picture."""
    shape = (_NOISE_TILE_PX, _NOISE_TILE_PX, 3)
    noise = np.clip(rng.standard_normal(shape, np.float32) * rng.uniform(0, 9) + 128, 0, 255).astype(np.uint8)
    repeats = (-(-picture.height // _NOISE_TILE_PX), -(-picture.width // _NOISE_TILE_PX), 1)
    tiled = np.tile(noise, repeats)[: picture.height, : picture.width]
    return ImageChops.add(picture, Image.fromarray(tiled), offset=-128)


def encode(picture: Image.Image, suffix: str, quality: int = 90) -> bytes:
    """The bytes of a `.jpg`, `.png` or `.webp` file; settings favour speed over size."""
    to_bytes: dict[str, Callable[[io.BytesIO], None]] = {
        ".jpg": lambda out: picture.save(out, "JPEG", quality=quality),
        ".png": lambda out: picture.save(out, "PNG", compress_level=1),
        ".webp": lambda out: picture.save(out, "WEBP", quality=quality, method=0),
    }
    buffer = io.BytesIO()
    to_bytes[suffix](buffer)
    return buffer.getvalue()


def drawn_file(number: int, seed: int) -> tuple[str, bytes]:
    """Name and bytes of picture `number` of a seed, for example `red-circle_0007.jpg`.

    Depends on nothing but its arguments, so pictures may be drawn in any order or in parallel. Classes take turns.
    """
    rng = np.random.default_rng([seed, number])
    class_index = number % len(CLASSES)
    picture = draw(class_index, rng)
    suffix = str(rng.choice((".jpg", ".png", ".webp"), p=(0.7, 0.15, 0.15)))
    data = encode(picture, suffix, quality=int(rng.integers(70, 96)))
    return f"{CLASSES[class_index].replace(' ', '-')}_{number:04d}{suffix}", data


def write_pictures(folder: Path, count: int, seed: int) -> int:
    """Writes pictures 0 to `count - 1` of a seed into `folder`, which is made if need be; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        name, data = drawn_file(number, seed)
        (folder / name).write_bytes(data)
    return count


def write_broken(folder: Path) -> int:
    """Writes files that no decoder can turn into a picture, each broken in another way; returns how many."""
    picture = draw(0, np.random.default_rng(0))
    jpeg, png = encode(picture, ".jpg"), encode(picture, ".png")
    broken = {
        "broken-truncated.jpg": jpeg[: len(jpeg) // 2],
        "broken-empty.jpg": b"",
        "broken-text.png": b"This is a text file that somebody renamed to .png.\n",
        "broken-bomb.png": _png_of_claimed_size(60_000, 60_000),
        "broken-damaged.png": png[: len(png) // 2] + bytes(256) + png[len(png) // 2 + 256 :],
        "broken-zeros.webp": bytes(4096),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    return len(broken)


def _png_of_claimed_size(width: int, height: int) -> bytes:
    """A well-formed PNG of a few hundred bytes whose header promises width × height RGB pixels (PNG spec, 11.2.2)."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b""))
    )
