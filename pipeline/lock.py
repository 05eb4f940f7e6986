"""A lock file that jobs on several machines respect, and that nobody holds after his death.

Its holder rewrites it every few seconds. Who waits takes it over when the beats stop, or at once where the holder was a
process of this very machine that is gone.
"""

import json
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from pipeline.processes import is_running, pid_namespace
from pipeline.storage import create_bytes, put_bytes, redact
from pipeline.store_errors import reading
from schemas.errors import OutputError

_BEAT_S = 5.0
_SILENT_BEATS = 4
_LOOK_S = 0.5
_TELL_AFTER_S = 60.0

log = logging.getLogger(__name__)


class Held:
    """A lock that is held. It may be lost: to another job that saw no beat for long, because the store was away."""

    def __init__(self, fs: AbstractFileSystem, lock: str) -> None:
        self._fs = fs
        self._lock = lock
        self._token = uuid.uuid4().hex

    def check(self) -> None:
        """Raise OutputError where somebody else may hold it by now. Ask before each step that cannot be taken back."""
        if not self.is_ours():
            raise OutputError(
                f"{redact(self._lock)} went to another job, because the store did not answer this one for a while or "
                "many waited at once; this one therefore stops. Run the same command again"
            )

    def is_ours(self) -> bool:
        """Whether the file is still the one that we made. Raises OutputError where the store does not say."""
        try:
            with reading(self._lock):
                said = self._fs.cat_file(self._lock)
            return bool(json.loads(said).get("holder") == self._token)
        except (FileNotFoundError, ValueError, AttributeError):
            return False

    def beat(self) -> bytes:
        """Who holds the lock, and something that no earlier beat said."""
        said = {"machine": _machine(), "pid": os.getpid(), "holder": self._token, "beat": uuid.uuid4().hex}
        return json.dumps(said).encode()

    def keep_beating(self, done: threading.Event) -> None:
        """Until `done`, or until it is lost. A beat that fails is not the last: the next one may pass."""
        while not done.wait(_BEAT_S):
            with suppress(Exception):
                if not self.is_ours():
                    return
                put_bytes(self._fs, self._lock, self.beat())

    def release(self) -> None:
        """Remove the file, unless it is another's by now. Where the store does not let us, who waits buries it."""
        with suppress(Exception):  # it must not hide what came first
            if self.is_ours():
                self._fs.rm_file(self._lock)


@contextmanager
def locked(
    fs: AbstractFileSystem, lock: str, what: str, *, unless: Callable[[], bool] = lambda: False
) -> Iterator[Held | None]:
    """Hold the file `lock` for the block.

    Yields None, without it, as soon as `unless` says that there is nothing left to wait for. A holder that beats is
    waited for however long it takes; after a minute the log says that it is, with `what` it does.
    """
    held = Held(fs, lock)
    if not _take(fs, lock, held, what, unless):
        yield None
        return
    done = threading.Event()
    beating = threading.Thread(target=held.keep_beating, args=(done,), daemon=True)
    beating.start()
    try:
        yield held
    finally:
        done.set()
        beating.join()
        held.release()


def _take(fs: AbstractFileSystem, lock: str, held: Held, what: str, unless: Callable[[], bool]) -> bool:
    """Wait until `held` holds the lock; False where `unless` came first."""
    holder = _Holder()
    tell_at = time.monotonic() + _TELL_AFTER_S
    waited = False
    while True:
        # It may be ours although we were refused: the answer to a first try was lost.
        if create_bytes(fs, lock, held.beat()) or held.is_ours():
            if not waited:
                return True
            # Another that waited may just be removing what the dead holder left, and meet our file instead.
            time.sleep(_LOOK_S)
            if held.is_ours():
                return True
        if unless():
            return False
        waited = True
        if holder.is_gone(fs, lock):
            holder.bury(fs, lock)
        elif time.monotonic() > tell_at:
            log.warning("waiting for another job, which has been %s for a while and holds %s", what, redact(lock))
            tell_at = float("inf")
        time.sleep(_LOOK_S)


def _machine() -> str | None:
    """This boot of this machine and its process numbers."""
    namespace = pid_namespace()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {namespace}" if namespace else None
    except OSError:
        return None


class _Holder:
    """Watches another job's lock. Its beats are told apart by their content and timed by the clock of this machine,
    because the clocks of two machines need not agree."""

    def __init__(self) -> None:
        self._beat = b""
        self._since = time.monotonic()

    def is_gone(self, fs: AbstractFileSystem, lock: str) -> bool:
        """Whether the holder was killed: it has been silent for several beats, or is no process of this machine."""
        try:
            with reading(lock):
                beat = fs.cat_file(lock)
        except FileNotFoundError:
            return False
        if beat != self._beat:
            self._beat, self._since = beat, time.monotonic()
        return time.monotonic() - self._since > _SILENT_BEATS * _BEAT_S or _was_here(beat)

    def bury(self, fs: AbstractFileSystem, lock: str) -> None:
        """Remove what a holder that is gone left, unless somebody else holds the lock by now."""
        time.sleep(random.uniform(0, _LOOK_S))  # all who wait find it dead at the same moment
        with suppress(FileNotFoundError), reading(lock):
            if fs.cat_file(lock) == self._beat:
                fs.rm_file(lock)


def _was_here(beat: bytes) -> bool:
    """Whether a process of this machine wrote `beat`, and is gone."""
    try:
        said: Any = json.loads(beat)
        return said["machine"] is not None and said["machine"] == _machine() and not is_running(said["pid"])
    except (ValueError, KeyError, TypeError):
        return False
