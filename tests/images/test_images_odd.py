"""Hostile, broken and merely odd files: every one ends in one row, and the process stays whole and small."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.odd_images import POSTSCRIPT, bombs, damage, mutated
from support.testdata import fuzzed_images, needs_testdata, public_domain_photos, rotated_images

from pipeline.images.limits import DECODE_LIMIT_S

ROOT = Path(__file__).parents[2]
CHILD = """
import json, sys, time
sys.path[:0] = sys.argv[1:3]
from support.manifests import decode_batches, manifest_of
files = json.load(sys.stdin)
rows, slowest = [], 0.0
for batch in decode_batches(manifest_of(files), batch_rows=64):
    batch.validate(full=True)
    slowest = max(slowest, *batch["decode_s"].to_pylist())
    pixels = [len(value) if value else None for value in batch["pixels"].to_pylist()]
    rows += zip(batch["row"].to_pylist(), pixels, *(batch[name].to_pylist() for name in ("stage", "error", "message")))
with open("/proc/self/status") as status:
    peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
json.dump({"rows": rows, "peak_mib": peak_kib // 1024, "slowest_s": slowest}, sys.stdout)
"""


def decode_in_child(files):
    """Results by file, peak memory in MiB, seconds of the slowest decode, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(ROOT), str(ROOT / "tests")],
        input=json.dumps([str(path) for path in files]),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert [row[0] for row in report["rows"]] == list(range(len(files)))
    for _, pixels, stage, error, message in report["rows"]:
        if error is None:
            assert pixels == 32 * 32 * 3
            assert stage is message is None
        else:
            assert pixels is None
            assert stage == "decode"
            assert message
            assert message.isprintable()
    return report


def written(folder, files):
    paths = []
    for number, (_, data) in enumerate(files):
        paths.append(folder / f"{number:05d}")
        paths[-1].write_bytes(data)
    return paths


@needs_testdata
def test_the_fuzz_corpus():
    files = fuzzed_images()
    report = decode_in_child(files)
    assert len(files) > 1200
    errors = Counter(row[3] for row in report["rows"])
    assert errors[None] > 250
    assert set(errors) <= {None, "Corrupt", "Truncated", "NotAnImage", "TooManyPixels", "EmptyImage"}
    assert report["peak_mib"] < 700
    assert report["slowest_s"] < 5


@needs_testdata
def test_every_photograph_decodes():
    files = public_domain_photos() + rotated_images()
    report = decode_in_child(files)
    assert [row[3] for row in report["rows"]] == [None] * len(files)
    assert report["peak_mib"] < 1200


DECODED_ALL_THE_SAME = {
    "png of zeros, 90 megapixels",
    "png of 16-bit zeros, 20 megapixels",
    "png of transparent zeros, 90 megapixels",
    "png of 100,000 chunks",
}
TOO_MANY = {"TooManyPixels"}
KNOWN_REASONS = {
    "png header of 2.5 gigapixels": TOO_MANY,
    "png in an icon, 2.5 gigapixels": TOO_MANY,
    "gif of 4 gigapixels": TOO_MANY,
    "tiff of 4 gigapixels": TOO_MANY,
    "tiff with a tile of 268 megapixels": TOO_MANY,
    "tiff with a tile of 268 megapixels, or of 256": TOO_MANY,
    "tga of 4 gigapixels": TOO_MANY,
    "webp of 268 megapixels": TOO_MANY,
    "jpeg of 65500 × 65500": TOO_MANY,
    "jpeg of 20,000 scans": {"Corrupt"},
    "ppm of 99 megapixels and no data": {"Truncated"},
    "nothing": {"NotAnImage"},
    "postscript": {"NotAnImage"},
    "svg": {"NotAnImage"},
    "zip": {"NotAnImage"},
}


@pytest.mark.slow
def test_bombs_become_failures_before_memory_is_spent(tmp_path):
    files = bombs()
    report = decode_in_child(written(tmp_path, files.items()))
    errors = {name: row[3] for name, row in zip(files, report["rows"], strict=True)}
    assert {name for name, error in errors.items() if error is None} == DECODED_ALL_THE_SAME
    for name, expected in KNOWN_REASONS.items():
        assert errors[name] in expected, name
    assert report["peak_mib"] < 1200
    assert report["slowest_s"] < 0.9 * DECODE_LIMIT_S


@pytest.mark.slow
def test_damaged_files_of_every_format(tmp_path):
    files = written(tmp_path, mutated(40, seed=int(os.environ.get("PATCHSTREAM_FUZZ_SEED", "1"))))
    report = decode_in_child(files)
    assert report["peak_mib"] < 1200
    assert 20 < sum(row[3] is None for row in report["rows"]) < len(files)


@needs_testdata
def test_damaged_heic_and_ten_bit_avif(tmp_path):
    draw = random.Random(7)
    good = [path.read_bytes() for path in public_domain_photos() if path.suffix == ".heic" or "10bit" in path.name]
    assert len(good) == 2
    files = written(tmp_path, [("", damage(data, draw)) for data in good for _ in range(5)])
    report = decode_in_child(files)
    assert report["peak_mib"] < 1200


def test_no_program_is_started(tmp_path):
    """A Ghostscript on the PATH that would leave a trace is not called."""
    trace = tmp_path / "called"
    fake = tmp_path / "gs"
    fake.write_text(f"#!/bin/sh\ntouch {trace}\n")
    fake.chmod(0o755)
    (tmp_path / "a.eps").write_bytes(POSTSCRIPT)
    old = os.environ["PATH"]
    os.environ["PATH"] = f"{tmp_path}:{old}"
    try:
        report = decode_in_child([tmp_path / "a.eps"])
    finally:
        os.environ["PATH"] = old
    assert "PostScript" in report["rows"][0][4]
    assert not trace.exists()
