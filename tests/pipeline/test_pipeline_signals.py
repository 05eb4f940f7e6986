"""Told to stop in the midst of a store's driver, whose errors are dealt with all alike: a signal is none of them."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.models import inspect_model
from pipeline.record import read_record
from pipeline.signals import heeding_signals, interruptible
from pipeline.sources.listing import list_source
from pipeline.sources.reading import open_object
from pipeline.storage import create_bytes, put_bytes
from schemas.errors import Interrupted

FS = fsspec.filesystem("memory")


def read(address: str) -> None:
    with open_object(address, {}):
        pass


@pytest.mark.parametrize(
    "work",
    [
        lambda: list(list_source("memory://stopped/", {})),
        lambda: read("memory://stopped/a.csv"),
        lambda: inspect_model("memory://stopped/vit.npz"),
        lambda: put_bytes(FS, "/stopped/a", b"a"),
        lambda: create_bytes(FS, "/stopped/b", b"b"),
        lambda: read_record("memory://stopped", {}),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_no_error_of_the_store(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any], number: signal.Signals
) -> None:
    FS.pipe_file("/stopped/a.csv", b"uri")

    def told(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        raise OSError("the next error of the driver")

    for name in ("info", "ls", "_open", "cat_file", "pipe_file", "exists", "isfile"):
        monkeypatch.setattr(MemoryFileSystem, name, told)
    with pytest.raises(Interrupted if number == signal.SIGTERM else KeyboardInterrupt) as stopped, interruptible():
        work()
    if isinstance(stopped.value, Interrupted):
        assert stopped.value.exit_code == 143


def as_ray_does() -> None:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None


def test_what_ray_makes_of_a_signal_keeps_its_number() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped, interruptible():
        as_ray_does()
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_work_that_refuses_to_be_interrupted_is_asked_again() -> None:
    """DuckDB does, while a connection begins or ends a call."""
    asked: list[int] = []
    ended = threading.Event()

    def work() -> None:
        time.sleep(0.5)  # by then it is waited for
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert ended.wait(60)

    def interrupt() -> None:
        asked.append(1)
        if len(asked) == 1:
            raise RuntimeError("connection is busy with another call")
        ended.set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            heeding_signals(work, interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(asked) == 2
