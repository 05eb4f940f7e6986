"""One holder at a time; who is dead holds nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from support.fleeting import fleeting

from pipeline import lock
from pipeline.lock import locked
from pipeline.processes import is_running
from pipeline.storage import filesystem
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


def test_a_living_holder_is_waited_for_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "_TELL_AFTER_S", 0.0)
    holder = held_by_another(tmp_path / "_lock")
    try:
        looks = iter([False, False, False, True])
        with locked(FS, str(tmp_path / "_lock"), "rewriting parts", unless=lambda: next(looks)) as mine:
            assert not mine
        assert (tmp_path / "_lock").exists()
        (told,) = [record.message for record in caplog.records if record.name == "pipeline.lock"]
        assert told == (
            "waiting for another job, which has been rewriting parts for a while and holds " + str(tmp_path / "_lock")
        )
    finally:
        holder.kill()
        holder.wait()


def test_a_killed_process_that_nobody_has_waited_for_holds_nothing(tmp_path: Path) -> None:
    holder = held_by_another(tmp_path / "_lock")
    assert is_running(holder.pid)
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie
    assert not is_running(holder.pid)
    started = time.monotonic()
    with locked(FS, str(tmp_path / "_lock"), "testing"):
        assert time.monotonic() - started < lock._BEAT_S
    holder.wait()


class Distant(LocalFileSystem):
    """A store that takes its time over every answer."""

    cachable = False

    def cat_file(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(random.uniform(0.01, 0.05))
        return super().cat_file(*args, **kwargs)

    def rm_file(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(random.uniform(0.01, 0.05))
        super().rm_file(*args, **kwargs)


def test_of_many_that_wait_for_a_dead_holder_each_has_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_bytes = lock.create_bytes

    def create_late(fs: LocalFileSystem, name: str, data: bytes) -> bool:
        time.sleep(random.uniform(0.01, 0.05))
        return create_bytes(fs, name, data)

    monkeypatch.setattr(lock, "create_bytes", create_late)
    monkeypatch.setattr(lock, "_LOOK_S", 0.15)
    monkeypatch.setattr(lock, "_BEAT_S", 0.25)
    path = tmp_path / "_lock"
    path.write_text(json.dumps({"machine": "another", "pid": 1, "holder": "dead", "beat": "x"}))
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        with locked(Distant(), str(path), "testing") as held:
            assert held is not None
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.05)
            held.check()
            inside.remove(number)

    with ThreadPoolExecutor(24) as jobs:
        list(jobs.map(work, range(24)))
    assert most == [1] * 24
    assert not path.exists()


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


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_store_that_goes_away_does_not_hide_what_ended_the_work(
    scheme: str, request: pytest.FixtureRequest, log_dir: Path
) -> None:
    """Drivers have errors of their own for that, not all of them an OSError."""
    with fleeting(request.getfixturevalue("s3_server" if scheme == "s3" else "gcs_server"), log_dir) as store:
        fs, out = filesystem(store.out, store.options)

        def work() -> None:
            with locked(fs, f"{out}/_lock", "testing") as held:
                assert held is not None
                store.leave()
                for look in (held.check, lambda: lock._Holder().is_gone(fs, f"{out}/_lock")):
                    with pytest.raises(OutputError, match=rf"cannot read {out}/_lock: "):
                        look()
                raise KeyError("what ended the work")

        with pytest.raises(KeyError, match="what ended the work"):
            work()
