"""Being told to go: a job writes what it holds before it does, a server simply ends."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from schemas.errors import Interrupted

_AGAIN_S = 0.1
T = TypeVar("T")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM is KeyboardInterrupt in the block, as Ctrl-C is, and Interrupted behind it.

    It is no Exception in the block: what deals with all errors that a driver may raise must let it pass. Does nothing
    in another thread than the main one, where Python allows no handler. Ray installs a handler of its own when it
    connects; `cluster.session` puts this one back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = Stop()
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if stop.number:  # Ray makes a KeyboardInterrupt of its own of ours
            raise Interrupted("told to stop", stop.number) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT (Ctrl-C, or Ray as it cancels a task) back until the block has ended.

    For imports: a package that was interrupted in the midst lacks some of its modules for as long as the process lives,
    and a worker lives on after a cancelled task. Does nothing in another thread, which SIGINT does not interrupt.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held = Stop()
    held.at_once = False
    signal.signal(signal.SIGINT, held)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held.number:
            before(held.number, None)


def heeding_signals(work: Callable[[], T], interrupt: Callable[[], None]) -> T:
    """What `work` gives, in another thread: a signal is heeded here at once, and `interrupt` makes `work` end.

    For DuckDB, which looks for signals only now and then, and puts a RuntimeError without a cause in the place of the
    KeyboardInterrupt that it finds.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    with ThreadPoolExecutor(1) as pool:
        running: Future[T] | None = None
        try:
            running = pool.submit(work)
            return running.result()
        except KeyboardInterrupt:
            while running is not None and not running.done():
                with contextlib.suppress(Exception):  # DuckDB refuses to while it begins or ends a call
                    interrupt()  # and again, for it may not have begun
                wait([running], _AGAIN_S)
            raise


class Stop:
    """Whether SIGINT or SIGTERM has come: `number` is that of the signal, 0 until then.

    While `at_once`, it also raises KeyboardInterrupt in the main thread. That alone would not do: an exception that
    comes in the midst of a destructor is lost.
    """

    def __init__(self) -> None:
        self.number = 0
        self.at_once = True

    def __call__(self, number: int, frame: Any) -> None:
        self.number = number
        if self.at_once:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Heed SIGINT and SIGTERM, also where the process was started with SIGINT ignored or is the first of a container.

    There Python installs no handler, and the system none of its own. Does nothing in another thread than the main one.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
