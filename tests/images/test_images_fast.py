"""`--decode fast`: JPEGs decoded at a smaller scale, close to the exact pixels and never below the target."""

import io

import numpy as np
import pytest
from PIL import Image
from support.testdata import needs_testdata, photos, public_domain_photos

from pipeline.images.decode import DecodeSpec, decode_into
from pipeline.images.formats import prepare_process
from pipeline.images.jpeg import decode_jpeg, scale_denominator
from schemas.preprocessing import Preprocessing


@pytest.fixture(autouse=True)
def _prepared():
    prepare_process()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((447, 900), 1), ((448, 448), 2), ((895, 9000), 2), ((896, 896), 4), ((1792, 1792), 8), ((24000, 24000), 8)],
)
def test_the_scale_is_the_smallest_that_does_not_fall_below_the_target(size, expected):
    assert scale_denominator(size, (224, 224)) == expected


def smooth(width, height):
    noise = np.random.default_rng(3).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def decoded(data, mode, preprocessing):
    out = np.empty((*preprocessing.output_size, 3), np.uint8)
    facts = decode_into(data, out, DecodeSpec(preprocessing, mode, 100_000_000))
    return facts, out.astype(int)


PREPROCESSINGS = [
    Preprocessing(resize=(64, 64)),
    Preprocessing(resize=(40, 90), resample=3),
    Preprocessing(shortest_edge=72, crop=(64, 64)),
    Preprocessing(shortest_edge=60, crop=(64, 64), resample=1),
]


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS)
@pytest.mark.parametrize("size", [(640, 480), (641, 483), (1021, 353), (300, 1999), (130, 131), (63, 500)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_picture_is_the_same_and_in_the_same_place(size, preprocessing, mode):
    """A shift by a tenth of a target pixel would show: the picture is smooth but not flat."""
    data = jpeg(smooth(*size).convert(mode))
    facts, fast = decoded(data, "fast", preprocessing)
    _, exact = decoded(data, "exact", preprocessing)
    assert (facts.width, facts.height) == size
    assert np.abs(fast - exact).mean() < 1.0


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("preprocessing", PREPROCESSINGS)
@pytest.mark.parametrize("size", [(641, 483), (1021, 353)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_in_the_same_place(orientation, size, preprocessing, window, monkeypatch):
    """A scaled decode ends with a part of a pixel, at the right and the bottom of the picture as it is stored."""
    if window:
        monkeypatch.setattr("pipeline.images.transform.MAX_INTERMEDIATE_PIXELS", 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(smooth(*size), exif=exif.tobytes())
    facts, fast = decoded(data, "fast", preprocessing)
    _, exact = decoded(data, "exact", preprocessing)
    assert (facts.width, facts.height) == (size if orientation < 5 else size[::-1])
    assert np.abs(fast - exact).mean() < 1.0


def test_a_scaled_decode_is_really_used():
    data = jpeg(smooth(1600, 1200))
    picture = decode_jpeg(data, (1600, 1200), 4)
    assert picture is not None
    assert picture.size == (400, 300)


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 2}])
def test_progressive_and_subsampled_files(options):
    data = jpeg(smooth(900, 700), **options)
    _, fast = decoded(data, "fast", PREPROCESSINGS[0])
    _, exact = decoded(data, "exact", PREPROCESSINGS[0])
    assert np.abs(fast - exact).mean() < 1.0


def test_a_small_jpeg_and_every_other_format_are_decoded_exactly():
    small = jpeg(smooth(120, 100))
    large = io.BytesIO()
    smooth(640, 480).save(large, "PNG")
    for data in (small, large.getvalue()):
        _, fast = decoded(data, "fast", PREPROCESSINGS[0])
        _, exact = decoded(data, "exact", PREPROCESSINGS[0])
        assert (fast == exact).all()


@pytest.mark.parametrize("mode_of_file", ["RGB", "L", "CMYK"])
def test_a_truncated_file_fails_in_both_modes(mode_of_file):
    data = jpeg(smooth(900, 700).convert(mode_of_file))
    for mode in ("exact", "fast"):
        for cut in (data[: len(data) // 2], data[: len(data) // 2] + b"\xff\xd9"):
            with pytest.raises(Exception, match="ends early") as caught:
                decoded(cut, mode, PREPROCESSINGS[0])
            assert caught.value.error == "Truncated"


@needs_testdata
def test_photographs_lose_little():
    preprocessing = Preprocessing(resize=(224, 224))
    files = [path for path in public_domain_photos() if path.suffix == ".jpg"][:6] + photos(60)
    scaled = []
    for path in files:
        data = path.read_bytes()
        with Image.open(path) as image:
            large = min(image.size) >= 448
        _, fast = decoded(data, "fast", preprocessing)
        _, exact = decoded(data, "exact", preprocessing)
        difference = np.abs(fast - exact).mean()
        if large:
            scaled.append(difference)
        else:
            assert difference == 0
    assert len(scaled) >= 6
    assert np.median(scaled) < 2.5
    assert max(scaled) < 8
