"""HEIC and AVIF that are cut short, and what may stand behind a whole one."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.testdata import needs_testdata, public_domain_photos

from pipeline.images.decode import DecodeSpec, ImageFacts, decode_into
from pipeline.images.formats import prepare_process
from schemas.errors import ImageError
from schemas.preprocessing import Preprocessing

pytestmark = pytest.mark.timeout(120)
SPEC = DecodeSpec(Preprocessing(resize=(32, 32)), "exact", 100_000_000)


@pytest.fixture(autouse=True)
def _prepared() -> None:
    prepare_process()


def decoded(data: bytes) -> ImageFacts:
    return decode_into(data, np.empty((32, 32, 3), np.uint8), SPEC)


def error_of(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decoded(data)
    return caught.value


def avif() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((200, 100), 50).convert("RGB").save(file, "AVIF")
    return file.getvalue()


def photo(name: str) -> bytes:
    (path,) = (path for path in public_domain_photos() if path.name == name)
    return Path(path).read_bytes()


@needs_testdata
@pytest.mark.parametrize("name", ["IMG_2682.heic", "8bit-sRGB.avif"])
def test_a_photograph_that_is_cut_anywhere_is_truncated(name: str) -> None:
    whole = photo(name)
    for kept in (20, 300, len(whole) // 50, len(whole) // 10, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 1):
        error = error_of(whole[:kept])
        assert (error.error, error.retryable) == ("Truncated", False), kept
        assert f"the file has {kept:,}" in str(error)


@needs_testdata
def test_a_photograph_whose_last_box_has_no_size_of_its_own() -> None:
    whole = photo("10bit-HDR-P3-nclx.avif")
    assert decoded(whole) == ImageFacts(3681, 5594, "AVIF")
    for kept in (len(whole) // 50, len(whole) // 2, len(whole) - 1):
        error = error_of(whole[:kept])
        assert error.error == "Corrupt", kept
        assert "starts like a HEIC or AVIF" in str(error)


def test_an_avif_that_is_cut_is_truncated() -> None:
    whole = avif()
    assert decoded(whole) == ImageFacts(200, 100, "AVIF")
    error = error_of(whole[:-1])
    assert error.error == "Truncated"
    assert f"its box `mdat` goes up to byte {len(whole):,}, the file has {len(whole) - 1:,}" in str(error)


def test_the_size_of_a_box_in_eight_bytes_counts_as_well() -> None:
    """And one of 0 goes up to the end of the file, wherever that is."""
    whole = avif()
    mdat = whole.index(b"mdat") - 4
    size = len(whole) - mdat
    spread = whole[:mdat] + struct.pack(">I4sQ", 1, b"mdat", size + 8) + whole[mdat + 8 :]
    assert error_of(spread[:-1]).error == "Truncated"
    assert f"byte {len(spread):,}" in str(error_of(spread[:-1]))
    assert decoded(whole[:mdat] + bytes(4) + whole[mdat + 4 :]) == ImageFacts(200, 100, "AVIF")


@pytest.mark.parametrize(
    "trailer",
    [
        struct.pack(">I4s", 5000, b"mpvd") + b"a moving picture that is cut short",
        b"SEFHe\0\0\0SEFT",
        b"\xff\xd9",
        bytes(40),
        struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + struct.pack(">I4s", 5000, b"mdat") + b"of another file",
    ],
    ids=["box", "vendor", "two bytes", "zeros", "a video"],
)
def test_what_stands_behind_a_whole_picture_is_let_be(trailer: bytes) -> None:
    assert decoded(avif() + trailer) == ImageFacts(200, 100, "AVIF")


def test_a_video_that_is_cut_is_no_picture() -> None:
    video = struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + struct.pack(">I4s", 5000, b"mdat") + b"cut"
    assert error_of(video).error == "NotAnImage"
