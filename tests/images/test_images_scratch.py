"""The memory in which JPEGs are decoded: kept from picture to picture by a thread, and seen in no result."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from pipeline.images import jpeg
from pipeline.images.decode import DecodeSpec, decode_into
from pipeline.images.formats import prepare_process
from schemas.preprocessing import Preprocessing

pytestmark = pytest.mark.timeout(60)

WAYS = [
    Preprocessing(resize=(30, 40)),
    Preprocessing(crop=(30, 40)),
    Preprocessing(crop=(90, 90)),
    Preprocessing(shortest_edge=60, crop=(64, 64)),
]


@pytest.fixture(autouse=True)
def _prepared():
    prepare_process()


@pytest.fixture
def rooms(monkeypatch):
    """Address and bytes of each array that simplejpeg decoded into."""
    found, decode = [], simplejpeg.decode_jpeg

    def noted(*arguments, **options):
        pixels = decode(*arguments, **options)
        room = options.get("buffer", pixels)
        found.append((room.ctypes.data, room.nbytes))
        return pixels

    monkeypatch.setattr("simplejpeg.decode_jpeg", noted)
    return found


def file_of(width, height, seed=0, orientation=1):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(noise).save(file, "JPEG", quality=95, exif=exif.tobytes())
    return file.getvalue()


def decoded(data, preprocessing=WAYS[0]):
    out = np.empty((*preprocessing.output_size, 3), np.uint8)
    decode_into(data, out, DecodeSpec(preprocessing, "exact", 10**6))
    return out


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("preprocessing", WAYS)
def test_the_next_picture_changes_none_before(preprocessing, orientation):
    """40 × 30 needs no resize by the first way, nor a crop by the second."""
    first = decoded(file_of(40, 30, 1, orientation), preprocessing)
    before = first.copy()
    decoded(file_of(40, 30, 2, orientation), preprocessing)
    assert (first == before).all()
    assert (decoded(file_of(40, 30, 1, orientation), preprocessing) == before).all()


def test_a_smaller_picture_in_the_room_of_a_larger_one_is_pillows():
    decoded(file_of(300, 200, 1))
    data = file_of(40, 30, 2, orientation=6)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert (decoded(data, Preprocessing(resize=(40, 30))) == np.asarray(upright)).all()


def test_a_thread_decodes_in_the_same_memory_again(rooms):
    with ThreadPoolExecutor(1) as thread:
        for size in ((300, 200), (40, 30), (200, 300)):
            thread.submit(decoded, file_of(*size)).result()
        assert len(set(rooms)) == 1
        thread.submit(decoded, file_of(300, 201)).result()
        assert rooms[-1][1] == 4 * 300 * 201


def test_each_thread_has_its_own(rooms):
    """The second one decodes while the first holds a picture."""
    with ThreadPoolExecutor(1) as other:
        mine = jpeg.decode_jpeg(file_of(40, 30, 1), (40, 30), 1)
        before = np.asarray(mine).copy()
        other.submit(jpeg.decode_jpeg, file_of(40, 30, 2), (40, 30), 1).result()
        assert (np.asarray(mine) == before).all()
        assert rooms[0][0] != rooms[1][0]


def test_no_more_is_kept_than_a_worker_can_spare(rooms, monkeypatch):
    monkeypatch.setattr(jpeg, "_KEPT_BYTES", 4 * 40 * 30)
    with ThreadPoolExecutor(1) as thread:
        for size in ((40, 30), (41, 30), (40, 30)):
            thread.submit(decoded, file_of(*size)).result()
    assert rooms[0] == rooms[2]
    assert [count for _, count in rooms] == [4 * 40 * 30, 4 * 41 * 30, 4 * 40 * 30]
