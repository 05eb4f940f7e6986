"""Archives that stay open from one member to the next: opening one reads its whole directory."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fsspec import AbstractFileSystem

from pipeline.images.retry import NoRoomError
from schemas.errors import ImageError

# Of one archive. Each holds its whole directory, which is some hundred MiB for a hundred thousand members.
_INSTANCES = 4
_LOOK_AGAIN_S = 0.1


@dataclass(eq=False, slots=True)
class _Use:
    """A thread's use of an archive; without one yet while it waits for its turn, and while it opens one."""

    name: str
    since_s: float = 0.0
    archive: AbstractFileSystem | None = None


class Archives:
    """File systems inside files, each lent to one thread at a time: their drivers are made for no more.

    Of one archive a few are open, one after the other is opened, and threads get them in the order in which they came.
    A use that takes half the time limit of the thread that waits for it is taken for hung, and counts no more.
    """

    def __init__(self, limit: int) -> None:
        """At most `limit` stay open while nobody reads from them; the longest unused ones are closed."""
        self._limit = limit
        self._idle: list[tuple[str, AbstractFileSystem]] = []
        self._waiting: list[_Use] = []
        self._uses: list[_Use] = []
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def lent(
        self, name: str, opened: Callable[[], AbstractFileSystem], *, timeout_s: float
    ) -> Iterator[AbstractFileSystem]:
        """The archive `name`, `opened` anew where none is idle. It is dropped after an error that may be its own.

        Raises TimeoutError where no turn comes within `timeout_s`.
        """
        use = self._begun(name, timeout_s)
        whole = False
        try:
            archive = use.archive or self._add(use, opened())
            yield archive
            whole = True
        except (FileNotFoundError, ImageError, NoRoomError):  # of a member
            whole = True
            raise
        finally:
            self._end(use, whole)

    def close(self) -> None:
        """Keep nothing open any more. What is lent is closed when it comes back."""
        with self._changed:
            self._limit = 0
            idle, self._idle = self._idle, []
        for _, archive in idle:
            _close(archive)

    def _begun(self, name: str, timeout_s: float) -> _Use:
        use = _Use(name)
        ends_s = time.monotonic() + timeout_s
        with self._changed:
            self._waiting.append(use)
            try:
                while not self._has_turn(use, timeout_s / 2):
                    left_s = ends_s - time.monotonic()
                    if left_s <= 0:
                        raise TimeoutError(f"others read from the archive, and left no turn within {timeout_s:g} s")
                    self._changed.wait(min(left_s, _LOOK_AGAIN_S))
                self._uses.append(use)
            finally:
                self._waiting.remove(use)
                self._changed.notify_all()
        return use

    def _has_turn(self, use: _Use, patience_s: float) -> bool:
        """Whether `use` may go on: with an idle archive, or to open one."""
        if next(other for other in self._waiting if other.name == use.name) is not use:
            return False
        use.since_s = time.monotonic()
        for place in reversed(range(len(self._idle))):
            if self._idle[place][0] == use.name:
                use.archive = self._idle.pop(place)[1]
                return True
        others = [other for other in self._uses if other.name == use.name and use.since_s - other.since_s < patience_s]
        return len(others) < _INSTANCES and all(other.archive is not None for other in others)

    def _add(self, use: _Use, archive: AbstractFileSystem) -> AbstractFileSystem:
        with self._changed:
            use.archive, use.since_s = archive, time.monotonic()
            self._changed.notify_all()
        return archive

    def _end(self, use: _Use, whole: bool) -> None:
        surplus = []
        with self._changed:
            self._uses.remove(use)
            if use.archive is not None:
                enough = sum(name == use.name for name, _ in self._idle) >= _INSTANCES
                if whole and not enough:
                    self._idle.append((use.name, use.archive))
                else:
                    surplus.append(use.archive)
            if len(self._idle) > self._limit:
                surplus.append(self._idle.pop(0)[1])
            self._changed.notify_all()
        for archive in surplus:
            _close(archive)


def _close(archive: AbstractFileSystem) -> None:
    close = getattr(archive, "close", None)
    if close is not None and not archive.cachable:  # else fsspec hands it out again
        close()
