"""Run reads ahead of the one who consumes them: results in order, threads and bytes bounded."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

Item = TypeVar("Item")
T = TypeVar("T")

# Beyond its own time limit a read gets this long before it is given up as hung inside its driver.
_GRACE_S = 15.0


class Room:
    """Bytes that may be held at a time by reads running or waiting to be consumed.

    The oldest read is always let through, whatever the others hold, so that the consumer never waits for itself.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held: dict[int, int] = {}
        self._total = 0
        self._since: dict[int, float] = {}
        self._oldest = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, ticket: int, nbytes: int) -> float:
        """Wait until `ticket` may hold `nbytes` in all. Returns the seconds waited."""
        started = time.monotonic()
        with self._changed:
            while not self._admit(ticket, nbytes):
                self._changed.wait()
        self.mark(ticket)
        return time.monotonic() - started

    def try_take(self, ticket: int, nbytes: int) -> bool:
        """The same without waiting: whether there is room now."""
        with self._changed:
            return self._admit(ticket, nbytes)

    def _admit(self, ticket: int, nbytes: int) -> bool:
        if ticket < self._oldest:
            return True  # given up as hung and consumed without it
        total = self._total - self._held.get(ticket, 0) + nbytes
        if ticket > self._oldest and total > self._limit and not self._closed:
            return False
        self._held[ticket], self._total = nbytes, total
        return True

    def mark(self, ticket: int) -> None:
        """`ticket` starts to work, after waiting for something."""
        self._since[ticket] = time.monotonic()

    def working_s(self, ticket: int) -> float:
        """Seconds since `ticket` was last marked; 0 if it has not begun."""
        since = self._since.get(ticket)
        return 0.0 if since is None else time.monotonic() - since

    def release(self, ticket: int) -> None:
        """`ticket` has been consumed; the next one is the oldest now."""
        with self._changed:
            self._total -= self._held.pop(ticket, 0)
            self._since.pop(ticket, None)
            self._oldest = ticket + 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let everybody through: nothing is consumed any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Job(Generic[Item, T]):
    def __init__(self, ticket: int, item: Item) -> None:
        self.ticket = ticket
        self.item = item
        self.future: Future[T] = Future()


class ReadAhead(Generic[Item, T]):
    """Results of `run(item, ticket)` for items with tickets 0, 1, …, in their order, from a few threads.

    At most `window` items are begun ahead of the consumer. A result counts as consumed, and its room is given back,
    when the next one is asked for. One that works longer than `limit_s` and a grace period, because a driver hangs
    where it cannot be interrupted, is replaced by `hung(item)`, and its thread by a new one.
    """

    def __init__(
        self,
        run: Callable[[Item, int], T],
        hung: Callable[[Item], T],
        *,
        room: Room,
        threads: int,
        window: int,
        limit_s: float,
    ) -> None:
        self._run = run
        self._hung = hung
        self._room = room
        self._threads = threads
        self._window = window
        self._limit_s = limit_s
        self._work: queue.SimpleQueue[_Job[Item, T] | None] = queue.SimpleQueue()
        self._started = 0

    def results(self, items: Iterable[Item]) -> Iterator[T]:
        """The results in order. Closing the iterator stops the threads; call once."""
        pending: deque[_Job[Item, T]] = deque()
        try:
            for ticket, item in enumerate(items):
                if self._started < self._threads:
                    self._start_thread()
                job: _Job[Item, T] = _Job(ticket, item)
                pending.append(job)
                self._work.put(job)
                if len(pending) >= self._window:
                    yield from self._consume(pending.popleft())
            while pending:
                yield from self._consume(pending.popleft())
        finally:
            self._room.close()
            for job in pending:
                job.future.cancel()
            for _ in range(self._started):
                self._work.put(None)

    def _start_thread(self) -> None:
        self._started += 1
        threading.Thread(target=self._serve, name=f"fetch-{self._started}", daemon=True).start()

    def _consume(self, job: _Job[Item, T]) -> Iterator[T]:
        while not job.future.done():
            wait([job.future], timeout=1.0)
            if self._room.working_s(job.ticket) > self._limit_s + _GRACE_S:
                break
        if job.future.done():
            yield job.future.result()
        else:
            self._start_thread()
            yield self._hung(job.item)
        self._room.release(job.ticket)

    def _serve(self) -> None:
        while (job := self._work.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            self._room.mark(job.ticket)
            try:
                result = self._run(job.item, job.ticket)
            except BaseException as error:  # noqa: BLE001  handed to the consumer, who raises it
                job.future.set_exception(error)
            else:
                job.future.set_result(result)
                del result
            del job
