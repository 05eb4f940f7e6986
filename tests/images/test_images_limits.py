"""What a single decode may do to its process."""

import ctypes
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.odd_images import png_chunk, png_file, tiled_tiff, zeros

from pipeline.images.decode import DecodeSpec, decode_into
from pipeline.images.formats import prepare_process
from pipeline.images.limits import DecodeTimeoutError, quiet_stderr, time_limit
from pipeline.images.tiff import tile_pixels
from schemas.errors import ImageError
from schemas.preprocessing import Preprocessing

ROOT = Path(__file__).parents[2]


def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_the_time_limit_interrupts_python_code_in_the_main_thread():
    started = time.monotonic()
    with pytest.raises(DecodeTimeoutError), time_limit(0.2):
        spin(10)
    assert time.monotonic() - started < 5


def test_a_decoder_that_swallows_the_first_interruption_gets_another():
    with pytest.raises(DecodeTimeoutError), time_limit(0.1):  # noqa: PT012 - the swallowing is the point
        try:
            spin(10)
        except DecodeTimeoutError:
            spin(10)


def test_the_time_limit_leaves_alarm_and_handler_as_they_were():
    before = signal.getsignal(signal.SIGALRM)
    outer = signal.setitimer(signal.ITIMER_REAL, 0)  # that of the test's own limit
    try:
        with time_limit(30):
            pass
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 200, 7)
        with time_limit(30):
            spin(0.1)
        left_s, again_s = signal.getitimer(signal.ITIMER_REAL)
        assert 100 < left_s < 199.95
        assert again_s == 7
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
    assert signal.getsignal(signal.SIGALRM) is before


def test_in_another_thread_there_is_no_time_limit_and_no_error():
    results = []

    def run():
        with time_limit(0.05):
            spin(0.3)
            results.append("done")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == ["done"]


def test_a_slow_picture_becomes_a_failure():
    """A PNG of 150,000 chunks takes Pillow's Python code about a second."""
    prepare_process()
    data = png_file(100, 100, zeros(101 * 100), *[png_chunk(b"teXt", b"a")] * 150_000)
    spec = DecodeSpec(Preprocessing(resize=(8, 8)), "exact", 10**6, limit_s=0.1)
    with pytest.raises(ImageError, match="time limit") as caught:
        decode_into(data, np.empty((8, 8, 3), np.uint8), spec)
    assert (caught.value.error, caught.value.retryable) == ("DecodeTimedOut", False)


@pytest.mark.parametrize("sides", [(112,), (112, 16), (16, 112)])
def test_a_tile_counts_as_pixels(sides):
    """libtiff decodes a tile whole, however little of it is in the picture, and takes the first of two sizes."""
    prepare_process()
    pixels = np.empty((8, 8, 3), np.uint8)
    with pytest.raises(ImageError, match=r"tiles of 12,544 pixels; the limit is 12,543") as caught:
        decode_into(tiled_tiff(*sides), pixels, DecodeSpec(Preprocessing(resize=(8, 8)), "exact", 112 * 112 - 1))
    assert caught.value.error == "TooManyPixels"
    decode_into(tiled_tiff(*sides), pixels, DecodeSpec(Preprocessing(resize=(8, 8)), "exact", 112 * 112))


@pytest.mark.parametrize("order", "<>")
def test_the_sides_of_tiles_are_read_in_every_layout(order):
    mark = b"II" if order == "<" else b"MM"
    small = struct.pack(order + "HIH", 42, 8, 2) + struct.pack(order + "HHIHxx", 322, 3, 1, 700)
    small += struct.pack(order + "HHII", 323, 16, 1, 34) + struct.pack(order + "Q", 50)  # too long for its entry
    assert tile_pixels(mark + small) == 700 * 50
    big = struct.pack(order + "HHHQQ", 43, 8, 0, 16, 2) + struct.pack(order + "HHQHxxxxxx", 322, 3, 1, 700)
    assert tile_pixels(mark + big + struct.pack(order + "HHQQ", 323, 16, 1, 50)) == 700 * 50
    assert tile_pixels(mark + big) == 0
    assert tile_pixels(mark + small[:4]) == 0


def test_quiet_stderr_drops_what_c_code_writes_and_restores_the_rest(capfd):
    with quiet_stderr():
        os.write(2, b"noise from C\n")
        ctypes.CDLL(None).perror(b"more noise")
    os.write(2, b"signal\n")
    assert capfd.readouterr().err == "signal\n"


def test_out_of_memory_becomes_a_failure_that_may_pass_later(tmp_path):
    """In a process that may take only so much: the picture would need 400 MB."""
    Image.new("RGB", (9000, 9000)).save(tmp_path / "a.png")
    code = (
        "import resource, sys; sys.path[:0] = sys.argv[2:]\n"
        "from support.manifests import decode_all, manifest_of\n"
        "from schemas.spec import FetchSpec\n"
        "import pipeline.images.formats as formats; formats.prepare_process()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (250 << 20),) * 2)\n"
        "row = decode_all(manifest_of([sys.argv[1]]), fetch=FetchSpec(concurrency=1)).to_pylist()[0]\n"
        "print(row['stage'], row['error'], row['retryable'])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.png"), str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "decode OutOfMemory True", done.stderr[-2000:]
