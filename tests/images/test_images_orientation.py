"""EXIF orientation: all eight give the upright picture, in every format that carries it, exactly and fast."""

import io

import numpy as np
import pytest
from PIL import Image
from support.testdata import needs_testdata, rotated_images

from pipeline.images.decode import DecodeSpec, decode_into
from pipeline.images.formats import prepare_process
from schemas.preprocessing import Preprocessing

# How a viewer would have to turn the upright picture so that the stored one results.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture(autouse=True)
def _prepared():
    prepare_process()


def upright():
    """600 × 480, a different colour in each corner, soft enough for every codec."""
    corners = np.array([[[250, 10, 10], [10, 250, 10]], [[10, 10, 250], [240, 240, 20]]], np.uint8)
    return Image.fromarray(corners).resize((600, 480), Image.Resampling.BICUBIC)


def stored(orientation, file_format):
    image = upright()
    if STORED[orientation] is not None:
        image = image.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    options = {"lossless": True} if file_format == "WEBP" else {"quality": 95}
    image.save(file, file_format, exif=exif.tobytes(), **options)
    return file.getvalue()


def decoded(data, mode="exact", preprocessing=None):
    preprocessing = preprocessing or Preprocessing(resize=(64, 80))
    out = np.empty((*preprocessing.output_size, 3), np.uint8)
    facts = decode_into(data, out, DecodeSpec(preprocessing, mode, 10_000_000))
    return facts, out.astype(int)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_of_every_format_is_turned_upright(file_format, orientation):
    facts, out = decoded(stored(orientation, file_format))
    assert (facts.width, facts.height, facts.format) == (600, 480, file_format)
    expected = np.asarray(upright().resize((80, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(out - expected).mean() < 2


@pytest.mark.parametrize("orientation", STORED)
def test_a_fast_decode_is_turned_too(orientation):
    facts, out = decoded(stored(orientation, "JPEG"), "fast")
    assert (facts.width, facts.height) == (600, 480)
    expected = np.asarray(upright().resize((80, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(out - expected).mean() < 2


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_shortest_edge_is_taken_of_the_upright_picture(orientation, mode):
    preprocessing = Preprocessing(shortest_edge=100, crop=(90, 110))
    _, out = decoded(stored(orientation, "JPEG"), mode, preprocessing)
    _, expected = decoded(stored(1, "JPEG"), "exact", preprocessing)
    assert np.abs(out - expected).mean() < 2


def test_broken_exif_leaves_the_picture_as_it_is_stored():
    file = io.BytesIO()
    upright().save(file, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    facts, _ = decoded(file.getvalue())
    assert (facts.width, facts.height) == (600, 480)


@needs_testdata
@pytest.mark.parametrize("name", ["Landscape", "Portrait"])
def test_the_photographs_in_eight_orientations_look_the_same(name):
    files = [path for path in rotated_images() if path.stem.startswith(name) and not path.stem.endswith("_0")]
    assert len(files) == 8
    pictures = [decoded(path.read_bytes()) for path in files]
    assert len({(facts.width, facts.height) for facts, _ in pictures}) == 1
    for _, out in pictures[1:]:
        assert np.abs(out - pictures[0][1]).mean() < 3
