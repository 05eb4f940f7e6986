"""Every pixel mode to RGB: the documented value, and for the common ones the reference's."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms
from support import checkpoints  # noqa: F401  lets transformers be imported
from transformers.image_transforms import convert_to_rgb

from pipeline.images.decode import DecodeSpec, decode_into
from pipeline.images.formats import prepare_process
from pipeline.modes import to_rgb
from pipeline.picture_formats import FORMATS
from schemas.preprocessing import Preprocessing

SIZE = (5, 4)


@pytest.fixture(autouse=True)
def _prepared():
    prepare_process()


def decoded(data, size=SIZE):
    """The RGB pixels of a file, not resized."""
    spec = DecodeSpec(Preprocessing(crop=(size[1], size[0])), "exact", 1_000_000)
    out = np.full((size[1], size[0], 3), 99, np.uint8)
    facts = decode_into(data, out, spec)
    assert (facts.width, facts.height) == size
    return out


def saved(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def constant(out):
    """The one colour of a picture."""
    colours = {tuple(pixel) for pixel in out.reshape(-1, 3).tolist()}
    assert len(colours) == 1, colours
    return colours.pop()


def palette_image(**options):
    image = Image.new("P", SIZE, 1)
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    return saved(image, "PNG", **options)


FLAT = [
    pytest.param(lambda: saved(Image.new("RGB", SIZE, (1, 2, 3)), "PNG"), (1, 2, 3), id="RGB"),
    pytest.param(lambda: saved(Image.new("L", SIZE, 77), "PNG"), (77, 77, 77), id="L"),
    pytest.param(lambda: saved(Image.new("1", SIZE, 1), "PNG"), (255, 255, 255), id="1 white"),
    pytest.param(lambda: saved(Image.new("1", SIZE, 0), "PNG"), (0, 0, 0), id="1 black"),
    pytest.param(lambda: palette_image(), (40, 50, 60), id="P"),
    pytest.param(lambda: palette_image(transparency=1), (255, 255, 255), id="P transparent"),
    pytest.param(lambda: palette_image(transparency=0), (40, 50, 60), id="P other colour transparent"),
    pytest.param(lambda: saved(Image.new("RGBA", SIZE, (0, 100, 200, 0)), "PNG"), (255, 255, 255), id="RGBA clear"),
    pytest.param(lambda: saved(Image.new("RGBA", SIZE, (0, 100, 200, 255)), "PNG"), (0, 100, 200), id="RGBA opaque"),
    pytest.param(lambda: saved(Image.new("RGBA", SIZE, (0, 100, 200, 51)), "PNG"), (204, 224, 244), id="RGBA fifth"),
    pytest.param(lambda: saved(Image.new("LA", SIZE, (0, 51)), "PNG"), (204, 204, 204), id="LA"),
    pytest.param(lambda: saved(Image.new("CMYK", SIZE, (0, 0, 0, 0)), "TIFF"), (255, 255, 255), id="CMYK white"),
    pytest.param(lambda: saved(Image.new("CMYK", SIZE, (255, 0, 0, 0)), "TIFF"), (0, 255, 255), id="CMYK cyan"),
    pytest.param(lambda: saved(Image.new("YCbCr", SIZE, (200, 128, 128)), "TIFF"), (200, 200, 200), id="YCbCr"),
    pytest.param(lambda: sixteen_bit_png(65535), (255, 255, 255), id="I;16 white"),
    pytest.param(lambda: sixteen_bit_png(257 * 100), (100, 100, 100), id="I;16 100"),
    pytest.param(lambda: sixteen_bit_png(300), (1, 1, 1), id="I;16 near black"),
    pytest.param(lambda: saved(Image.new("I", SIZE, 257 * 9), "TIFF"), (9, 9, 9), id="I of 16 bits"),
    pytest.param(lambda: saved(Image.new("I", SIZE, 200), "TIFF"), (200, 200, 200), id="I of 8 bits"),
    pytest.param(lambda: saved(Image.new("F", SIZE, 0.6), "TIFF"), (153, 153, 153), id="F in 0..1"),
    pytest.param(lambda: saved(Image.new("F", SIZE, 200.0), "TIFF"), (200, 200, 200), id="F in 0..255"),
    pytest.param(lambda: saved(Image.new("F", SIZE, float("nan")), "TIFF"), (0, 0, 0), id="F not a number"),
    pytest.param(lambda: b"P5 5 4 65535 " + struct.pack(">20H", *[257 * 7] * 20), (7, 7, 7), id="PGM 16 bits"),
]


def sixteen_bit_png(value):
    return saved(Image.fromarray(np.full((SIZE[1], SIZE[0]), value, np.uint16)), "PNG")


@pytest.mark.parametrize(("make", "expected"), FLAT)
def test_a_flat_picture_of_every_mode_has_the_colour_a_viewer_shows(make, expected):
    assert constant(decoded(make())) == expected


def test_sixteen_bits_of_a_ramp_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(1, 256)
    out = decoded(saved(Image.fromarray(ramp), "PNG"), (256, 1))
    np.testing.assert_array_equal(out[0, :, 0], np.arange(256))


def test_floats_of_unknown_range_are_stretched():
    values = np.array([[-5.0, 0.0, 5.0, float("inf"), float("-inf")]], np.float32)
    out = decoded(saved(Image.fromarray(values), "TIFF"), (5, 1))
    assert out[0, :, 0].tolist() == [0, 128, 255, 255, 0]


def test_a_twelve_bit_tiff_uses_its_whole_range():
    image = Image.fromarray(np.full((4, 5), 4095, np.uint16))
    image.tag_v2 = {258: (12,)}
    assert constant(np.asarray(to_rgb(image))) == (255, 255, 255)


@pytest.mark.parametrize("compression", ["raw", "tiff_deflate"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257 * 100, 65535]], np.uint16), [255, 155, 0]),
        (np.array([[0, 0.4, 1, float("nan")]], np.float32), [255, 153, 0, 0]),
        (np.array([[-5.0, 0, 5]], np.float32), [255, 128, 0]),
    ],
    ids=["16 bits", "floats in 0..1", "floats that are stretched"],
)
def test_a_wide_tiff_whose_zero_is_white(values, expected, compression):
    """Pillow turns round those of 8 bits alone."""
    data = saved(Image.fromarray(values), "TIFF", tiffinfo={262: 0}, compression=compression)
    assert decoded(data, (len(expected), 1))[0, :, 0].tolist() == expected


def mixed(mode):
    noise = np.random.default_rng(5).integers(0, 256, (40, 61, 4), np.uint8)
    return Image.fromarray(noise, "RGBA").convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_common_modes_equal_the_reference_conversion(mode):
    image = mixed("RGB").convert("P").convert("PA") if mode == "PA" else mixed(mode)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), convert_to_rgb(image, return_numpy=True))


def test_compositing_in_strips_equals_compositing_at_once(monkeypatch):
    image = mixed("RGBA")
    whole = np.asarray(to_rgb(image))
    monkeypatch.setattr("pipeline.modes._STRIP_PIXELS", 150)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), whole)


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha_is_composited_on_white(mode):
    straight = Image.new("LA" if mode == "La" else "RGBA", SIZE, (100, 128) if mode == "La" else (100, 50, 0, 128))
    out = np.asarray(to_rgb(straight.convert(mode))).astype(int)
    assert np.abs(out - np.asarray(to_rgb(straight)).astype(int)).max() <= 2


def test_adobe_cmyk_jpeg_is_not_inverted():
    red = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    out = decoded(red, (16, 16)).astype(int)
    assert np.abs(out - [255, 0, 0]).max() <= 4


def test_lab_is_converted_to_srgb():
    """L*a*b* 54.3, 81, 70 (of a D50 white) is sRGB's red; Pillow keeps a and b with an offset of 128."""
    red = Image.new("LAB", SIZE, (round(54.29 / 100 * 255), 81 + 128, 70 + 128))
    out = decoded(saved(red, "TIFF")).astype(int)
    assert np.abs(out - [255, 0, 0]).max() <= 5


def test_a_colour_profile_is_ignored():
    image = Image.new("RGB", SIZE, (200, 40, 10))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert constant(decoded(saved(image, "PNG", icc_profile=profile))) == (200, 40, 10)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation(file_format):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ["red", "blue", "lime"]]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = saved(frames[0], file_format, save_all=True, append_images=frames[1:], duration=50, **options)
    out = decoded(data, (32, 32)).astype(int)
    assert np.abs(out - [255, 0, 0]).max() <= 3


ROUND_TRIPS = [
    "BMP",
    "DIB",
    "GIF",
    "ICO",
    "JPEG2000",
    "PCX",
    "PNG",
    "PPM",
    "QOI",
    "SGI",
    "TGA",
    "TIFF",
    "DDS",
]


@pytest.mark.parametrize("file_format", ROUND_TRIPS)
def test_formats_beyond_the_usual_are_decoded(file_format):
    assert file_format in FORMATS
    image = Image.new("RGB", (32, 32), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 16, 32))
    out = decoded(saved(image, file_format), (32, 32)).astype(int)
    assert (out[:, :16] == [255, 0, 0]).all()
    assert (out[:, 16:] == [0, 0, 255]).all()
