"""A lock file that jobs on several machines respect, and that nobody holds after his death.

Its holder rewrites it every few seconds. Who waits takes it over when the beats stop, or at once where the holder was a
process of this very machine that is gone.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from pipeline.storage import create_bytes, put_bytes, redact
from schemas.errors import OutputError

_WAIT_S = 3600.0
_BEAT_S = 5.0
_SILENT_BEATS = 4
_LOOK_S = 0.5


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
                f"{redact(self._lock)} went to another job while the store did not answer this one, which therefore "
                "stops. Run the same command again"
            )

    def is_ours(self) -> bool:
        """Whether the file is still the one that we made."""
        try:
            return bool(json.loads(self._fs.cat_file(self._lock)).get("holder") == self._token)
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
        """Remove the file, unless it is another's by now."""
        if self.is_ours():
            _remove(self._fs, self._lock)


@contextmanager
def locked(
    fs: AbstractFileSystem, lock: str, what: str, *, unless: Callable[[], bool] = lambda: False
) -> Iterator[Held | None]:
    """Hold the file `lock` for the block.

    Yields None, without it, as soon as `unless` says that there is nothing left to wait for. `what` its holder does is
    named in the OutputError that an hour of waiting ends with.
    """
    deadline = time.monotonic() + _WAIT_S
    holder, held = _Holder(), Held(fs, lock)
    while not create_bytes(fs, lock, held.beat()):
        if held.is_ours():  # the answer to the first try was lost
            break
        if unless():
            yield None
            return
        if holder.is_gone(fs, lock):
            _remove(fs, lock)
        elif time.monotonic() > deadline:
            raise OutputError(f"another job has been {what} for an hour; if it is dead, delete {redact(lock)}")
        time.sleep(_LOOK_S)
    done = threading.Event()
    beating = threading.Thread(target=held.keep_beating, args=(done,), daemon=True)
    beating.start()
    try:
        yield held
    finally:
        done.set()
        beating.join()
        held.release()


def _machine() -> str | None:
    """This boot of this machine and its process numbers; containers of one machine count their processes apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
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
            beat = fs.cat_file(lock)
        except FileNotFoundError:
            return False
        if beat != self._beat:
            self._beat, self._since = beat, time.monotonic()
        return time.monotonic() - self._since > _SILENT_BEATS * _BEAT_S or _was_here(beat)


def _was_here(beat: bytes) -> bool:
    """Whether a process of this machine wrote `beat`, and is gone."""
    try:
        said: Any = json.loads(beat)
        if said["machine"] is None or said["machine"] != _machine():
            return False
        os.kill(said["pid"], 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, OSError):
        return False
    return False


def _remove(fs: AbstractFileSystem, path: str) -> None:
    with suppress(FileNotFoundError):
        fs.rm_file(path)
