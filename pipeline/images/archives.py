"""Archives that stay open from one member to the next: opening one reads its whole directory."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from fsspec import AbstractFileSystem

from pipeline.images.retry import NoRoomError
from schemas.errors import ImageError

# Where another thread is opening the same archive, it is likely to be done with it sooner than a second opening.
_PATIENCE_S = 2.0


class Archives:
    """File systems inside files, each lent to one thread at a time: their drivers are made for no more."""

    def __init__(self, limit: int) -> None:
        """At most `limit` stay open while nobody reads from them; the longest unused ones are closed."""
        self._limit = limit
        self._idle: list[tuple[str, AbstractFileSystem]] = []
        self._opening: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def lent(self, name: str, opened: Callable[[], AbstractFileSystem]) -> Iterator[AbstractFileSystem]:
        """The archive `name`, `opened` anew where none is idle. It is dropped after an error that may be its own."""
        fs = self._idle_one(name) or self._new_one(name, opened)
        try:
            yield fs
        except (FileNotFoundError, ImageError, NoRoomError):  # of a member
            self._keep(name, fs)
            raise
        except BaseException:
            _close(fs)
            raise
        self._keep(name, fs)

    def close(self) -> None:
        """Keep nothing open any more. What is lent is closed when it comes back."""
        with self._lock:
            self._limit = 0
            idle, self._idle = self._idle, []
        for _, fs in idle:
            _close(fs)

    def _new_one(self, name: str, opened: Callable[[], AbstractFileSystem]) -> AbstractFileSystem:
        opening = self._opening.setdefault(name, threading.Lock())
        alone = opening.acquire(timeout=_PATIENCE_S)
        try:
            return self._idle_one(name) or opened()
        finally:
            if alone:
                opening.release()

    def _idle_one(self, name: str) -> AbstractFileSystem | None:
        with self._lock:
            for place in reversed(range(len(self._idle))):
                if self._idle[place][0] == name:
                    return self._idle.pop(place)[1]
        return None

    def _keep(self, name: str, fs: AbstractFileSystem) -> None:
        with self._lock:
            self._idle.append((name, fs))
            surplus = [] if len(self._idle) <= self._limit else [self._idle.pop(0)]
        for _, old in surplus:
            _close(old)


def _close(fs: AbstractFileSystem) -> None:
    close = getattr(fs, "close", None)
    if close is not None and not fs.cachable:  # else fsspec hands it out again
        close()
