"""One holder at a time; who is dead holds nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline import lock
from pipeline.lock import locked
from schemas.errors import OutputError

FS = LocalFileSystem()
HOLDING = """
import sys, time
from fsspec.implementations.local import LocalFileSystem
from pipeline.lock import locked
with locked(LocalFileSystem(), sys.argv[1], "testing"):
    print("held", flush=True)
    time.sleep(60)
"""


def held_by_another(path: Path) -> "subprocess.Popen[str]":
    holder = subprocess.Popen([sys.executable, "-c", HOLDING, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_it_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "_lock"
    with locked(FS, str(path), "testing") as mine:
        assert mine
        assert path.exists()
    assert not path.exists()
    with pytest.raises(KeyError), locked(FS, str(path), "testing"):
        raise KeyError
    assert not path.exists()


def test_a_process_of_this_machine_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    holder = held_by_another(tmp_path / "_lock")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "_lock").exists()
    started = time.monotonic()
    with locked(FS, str(tmp_path / "_lock"), "testing"):
        assert time.monotonic() - started < lock._BEAT_S


def test_a_living_holder_is_waited_for_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_WAIT_S", 0.5)
    holder = held_by_another(tmp_path / "_lock")
    try:
        with (
            pytest.raises(OutputError, match="another job has been rewriting parts for an hour; if it is dead, delete"),
            locked(FS, str(tmp_path / "_lock"), "rewriting parts"),
        ):
            pass
        with locked(FS, str(tmp_path / "_lock"), "testing", unless=lambda: True) as mine:
            assert not mine
        assert (tmp_path / "_lock").exists()
    finally:
        holder.kill()
        holder.wait()


def test_another_machines_process_numbers_say_nothing(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ours = lock.Held(FS, "").beat().replace(str(os.getpid()).encode(), str(gone.pid).encode())
    assert lock._was_here(ours)
    assert not lock._was_here(ours.replace(b'"machine": "', b'"machine": "other-'))
    assert not lock._was_here(lock.Held(FS, "").beat())
    assert not lock._was_here(b"2001-01-01T00:00:00+00:00")


def test_a_beat_that_fails_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "_lock"
    monkeypatch.setattr(lock, "_BEAT_S", 0.05)
    put_bytes, failed = lock.put_bytes, threading.Event()

    def failing_once(fs: LocalFileSystem, name: str, data: bytes) -> None:
        if not failed.is_set():
            failed.set()
            raise OutputError("the store is busy")
        put_bytes(fs, name, data)

    monkeypatch.setattr(lock, "put_bytes", failing_once)
    with locked(FS, str(path), "testing"):
        assert failed.wait(10)
        before = path.read_bytes()
        deadline = time.monotonic() + 10
        while path.read_bytes() == before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.read_bytes() != before


def test_a_lock_that_was_lost_is_neither_beaten_nor_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "_lock"
    monkeypatch.setattr(lock, "_BEAT_S", 0.05)
    with locked(FS, str(path), "testing") as held:
        assert held is not None
        held.check()
        path.write_text('{"holder": "another"}')
        time.sleep(0.3)
        with pytest.raises(OutputError, match="went to another job"):
            held.check()
    assert path.read_text() == '{"holder": "another"}'
