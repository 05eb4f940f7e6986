"""SIGTERM as an exception, so that a job that is told to go writes what it holds before it does."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from schemas.errors import Interrupted


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted in the main thread on SIGTERM. Does nothing in another thread, where Python allows no handler.

    Ray installs a handler of its own when it connects; `cluster.session` puts this one back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: Any) -> None:
    raise Interrupted("told to stop", number)
