"""Try again what may pass: exponential back-off with full jitter, all tries within one time limit.

Full jitter as in https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
"""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.images.readahead import Room
from pipeline.images.verdict import fetch_failure, judge
from schemas.errors import ImageError
from schemas.spec import FetchSpec

T = TypeVar("T")

BASE_S = 0.1
CAP_S = 10.0


class NoRoomError(Exception):
    """A read needs more bytes than it was granted, and other reads hold them just now."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(f"{nbytes:,} bytes")
        self.nbytes = nbytes


class Attempts:
    """The tries of one read: their limit in number and time, and the room they may take."""

    def __init__(self, url: str, fetch: FetchSpec, room: Room, ticket: int) -> None:
        self.url = url
        self.count = 0
        self.waited_s = 0.0  # for others: for room, or for one's turn
        self._limit = fetch.attempts
        self._timeout_s = fetch.timeout_s
        self._room = room
        self._ticket = ticket
        self.restart_clock()

    def restart_clock(self) -> None:
        """What went before was waiting for others, not for this image."""
        self._deadline_s = time.monotonic() + self._timeout_s
        self._room.mark(self._ticket)

    def need(self, nbytes: int) -> None:
        """Ask for room without waiting. Raises NoRoomError, upon which `run` waits and reads again."""
        if not self._room.try_take(self._ticket, nbytes):
            raise NoRoomError(nbytes)

    def wait_for_room(self, nbytes: int) -> None:
        """Wait until `nbytes` may be held. The time does not count against the image."""
        waited_s = self._room.take(self._ticket, nbytes)
        self.waited_s += waited_s
        self._deadline_s += waited_s

    def wait_for_turn(self, wait: Callable[[], None]) -> None:
        """Wait until others have read what comes before. The time does not count against the image."""
        started = time.monotonic()
        wait()
        self.waited_s += time.monotonic() - started
        self.restart_clock()

    def run(self, read: Callable[[float], T]) -> T:
        """`read(seconds left)`, again as long as that may help. Raises ImageError, and nothing else."""
        while True:
            self.count += 1
            try:
                return read(self._deadline_s - time.monotonic())
            except NoRoomError as error:
                self.count -= 1
                self.wait_for_room(error.nbytes)
            except ImageError as error:
                error.attempts = self.count
                raise
            except Exception as error:  # noqa: BLE001  drivers raise what they like, and each becomes a row
                self._wait_or_raise(error)

    def _wait_or_raise(self, error: Exception) -> None:
        verdict = judge(error)
        wait_s = random.uniform(0, min(CAP_S, BASE_S * 2 ** min(self.count, 10)))
        wait_s = max(wait_s, verdict.wait_s or 0.0)
        if not verdict.again or self.count >= self._limit or time.monotonic() + wait_s >= self._deadline_s:
            raise fetch_failure(self.url, error, verdict, self.count) from error
        time.sleep(wait_s)
