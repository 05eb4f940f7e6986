"""An image that kills its process costs one worker, never the run; innocent images are not blamed for it."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from PIL import Image
from support.manifests import decode_all, manifest_of

from pipeline import decoding
from pipeline.images.guard import CrashGuard
from schemas.errors import ClusterError

ROOT = Path(__file__).parents[2]
# Decodes the files named on the command line under a guard. A file that begins with DIE, HANG or KILL does that to
# whatever process decodes it, as a broken C library would; it is patched in through sitecustomize, which the isolated
# process loads too.
CHILD = """
import sys
from pipeline.images.guard import CrashGuard
from support.manifests import decode_all, manifest_of
folder, hang_s, *files = sys.argv[1:]
table = decode_all(manifest_of(files), guard=CrashGuard(folder, hang_s=float(hang_s)))
for row in table.to_pylist():
    print(row["error"], row["attempts"], row["retryable"], sep="|")
"""
PATCH = """
import ctypes, os, signal, sys, threading
def arm():
    import pipeline.images.decode as decode
    original = decode._open
    def deadly(data, max_pixels):
        if data.startswith(b"DIE"):
            os.abort()
        if data.startswith(b"SEGV"):
            ctypes.string_at(0)
        if data.startswith(b"KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        if data.startswith(b"HANG"):
            ctypes.CDLL(None).pause()  # in C, without the interpreter; a handled signal ends it once
            while True:
                ctypes.CDLL(None).pause()
        return original(data, max_pixels)
    decode._open = deadly
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "pipeline.images.isolated" or name == "pipeline.images.stage":
            sys.meta_path.remove(self)
            arm()
        return None
sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def run(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(PATCH)

    def start(*files, hang_s=300.0):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT), str(ROOT / "tests")])}
        command = [sys.executable, "-c", CHILD, str(tmp_path / "notes"), str(hang_s), *map(str, files)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)

    return start


@pytest.fixture
def files(tmp_path):
    """Four pictures and, in the third place, a file to be filled by the test."""
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for path in paths:
        Image.new("RGB", (40, 30), "red").save(path)
    return paths


@pytest.mark.parametrize("how", [b"DIE", b"SEGV", b"KILL"])
def test_a_crash_costs_one_worker_and_then_becomes_a_row(run, files, how):
    files[2].write_bytes(how)
    first = run(*files)
    assert first.returncode < 0
    second = run(*files)
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines() == ["None|None|None"] * 2 + ["DecoderCrashed|2|False"] + ["None|None|None"] * 2


def test_a_decoder_that_never_returns_ends_its_worker(run, files):
    files[2].write_bytes(b"HANG")
    first = run(*files, hang_s=1.5)
    assert first.returncode == 1
    assert "row 2" in first.stderr
    assert "hangs" in first.stderr


def test_a_worker_that_was_killed_by_others_does_not_condemn_the_image(run, files):
    """The row is tried again, in isolation, and succeeds."""
    files[2].write_bytes(b"KILL")
    assert run(*files).returncode == -signal.SIGKILL
    Image.new("RGB", (40, 30), "red").save(files[2])
    again = run(*files)
    assert again.stdout.splitlines() == ["None|None|None"] * 5


def test_an_isolated_decode_gives_the_same_pixels_and_the_same_failures(tmp_path):
    Image.effect_noise((90, 70), 60).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"<html>")
    manifest = manifest_of([tmp_path / "a.png", tmp_path / "b.png"])
    plain = decode_all(manifest)
    for row in (0, 1):
        strike(tmp_path / "notes", row)
    guarded = decode_all(manifest, guard=CrashGuard(tmp_path / "notes"))
    names = ["pixels", "width", "height", "format", "sha256", "stage", "error", "message", "retryable"]
    assert guarded.select(names).equals(plain.select(names))


def strike(folder, row):
    """What the death of a process that decoded `row` leaves behind."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder.mkdir(exist_ok=True)
    (folder / f"{dead.pid}-12345.note").write_bytes(CrashGuard.note(row))


def test_strikes_are_counted_once_and_survive(tmp_path):
    for _ in range(3):
        strike(tmp_path, 7)
    strike(tmp_path, 8)
    guard = CrashGuard(tmp_path)
    assert (guard.strikes(7), guard.strikes(8), guard.strikes(9)) == (3, 1, 0)
    assert (CrashGuard(tmp_path).strikes(7), CrashGuard(tmp_path).strikes(8)) == (3, 1)


def test_the_death_of_four_workers_is_enough(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    for _ in range(4):
        strike(tmp_path / "notes", 0)
    (row,) = decode_all(manifest_of([tmp_path / "a.png"]), guard=CrashGuard(tmp_path / "notes")).to_pylist()
    assert (row["stage"], row["error"], row["attempts"], row["retryable"]) == ("decode", "DecoderCrashed", 4, False)
    assert row["sha256"]


def test_a_process_that_ends_well_leaves_no_strike(run, files, tmp_path):
    assert run(*files).returncode == 0
    guard = CrashGuard(tmp_path / "notes")
    assert [guard.strikes(row) for row in range(5)] == [0] * 5
    assert len(list((tmp_path / "notes").iterdir())) == 1


def test_the_note_of_a_living_process_is_left_alone(tmp_path):
    mine = CrashGuard(tmp_path)
    with mine.noted(3):
        code = "import sys; from pipeline.images.guard import CrashGuard; print(CrashGuard(sys.argv[1]).strikes(3))"
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=True
        )
    assert done.stdout.strip() == "0"


def test_the_note_of_a_living_process_is_left_alone_when_the_clock_is_set(tmp_path):
    """The start of a process in seconds since 1970 moves with it."""
    mine = CrashGuard(tmp_path)
    with mine.noted(3):
        code = (
            "import sys, psutil; began = psutil.Process.create_time\n"
            "psutil.Process.create_time = lambda process: began(process) - 3600\n"
            "from pipeline.images.guard import CrashGuard; print(CrashGuard(sys.argv[1]).strikes(3))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
            timeout=60,
        )
    assert done.stdout.strip() == "0"


def test_the_number_of_a_dead_process_may_be_that_of_another_by_now(tmp_path):
    mine = CrashGuard(tmp_path)
    (note,) = tmp_path.glob("*.note")
    mark = note.name.partition("-")[2]
    another = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (tmp_path / f"{another.pid}-{mark}").write_bytes(CrashGuard.note(4))
        mine.close()
        assert CrashGuard(tmp_path).strikes(4) == 1
    finally:
        another.communicate(b"\n", timeout=60)


def test_a_note_costs_microseconds(tmp_path):
    guard = CrashGuard(tmp_path)
    started = time.perf_counter()
    for row in range(10_000):
        guard.strikes(row)
        with guard.noted(row):
            pass
    assert (time.perf_counter() - started) / 10_000 < 100e-6


def test_a_folder_that_goes_as_it_is_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of the other processes removes it between the refusal to make it and the next step."""
    folder, make = tmp_path / "notes", os.mkdir
    folder.mkdir()

    def made_too_late(path: str, mode: int = 0o777) -> None:
        try:
            make(path, mode)
        except FileExistsError:
            os.rmdir(path)
            raise

    monkeypatch.setattr(os, "mkdir", made_too_late)
    guard = CrashGuard(folder)
    guard.close()
    assert not folder.exists()


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    with pytest.raises(NotADirectoryError):
        CrashGuard(tmp_path / "notes")


def test_a_full_disk_is_told_and_does_not_kill_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written through a map of a file with holes it would be a signal. Here the size of files is what is limited."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        with pytest.raises(ClusterError, match=f"no file can be put into {tmp_path}/patchstream-r .*TMPDIR"):
            decoding._guard("r")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
