"""Remember which image a process was decoding when it died, so that it is not tried for ever.

Before an image is decoded, its row is noted in a small memory-mapped file of this process. The notes of processes
that are gone are read by the next `CrashGuard` over the same folder: each is a strike against a row. A row with a
strike is decoded in a process of its own (`isolated`), where its death is harmless and certain.
"""

import contextlib
import mmap
import os
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

_NOTE = struct.Struct("<qd")  # row or -1, monotonic time of its start
_NOTHING = -1
# A decoder that hangs inside C for this long is ended with its process; time_limit has had its turn long before.
HANG_S = 300.0
_WATCH_S = 5.0


class CrashGuard:
    """Notes and strikes of one run on one machine. Give it a folder of the run's own on a local disk.

    One for each process at a time. Raises OSError when the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], *, hang_s: float = HANG_S) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._hang_s = hang_s
        self._note = self._open_note()
        self._collect()
        self._strikes = Counter(int(path.name.partition("-")[0]) for path in self._folder.glob("*.strike"))
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="decode-watch", daemon=True).start()

    def close(self) -> None:
        """Take back the note of this process."""
        self._closed.set()
        _NOTE.pack_into(self._note, 0, _NOTHING, 0.0)

    def strikes(self, row: int) -> int:
        """How many processes died while they decoded `row`, as far as known when this guard was made."""
        return self._strikes[row] if self._strikes else 0

    @contextlib.contextmanager
    def noted(self, row: int) -> Iterator[None]:
        """While the block runs, the death of this process is a strike against `row`."""
        _NOTE.pack_into(self._note, 0, row, time.monotonic())
        try:
            yield
        finally:
            _NOTE.pack_into(self._note, 0, _NOTHING, 0.0)

    def _open_note(self) -> mmap.mmap:
        pid = os.getpid()
        path = self._folder / f"{pid}-{_started(pid)}.note"
        with path.open("a+b") as file:
            if os.fstat(file.fileno()).st_size < _NOTE.size:
                file.truncate(_NOTE.size)
            note = mmap.mmap(file.fileno(), _NOTE.size)
        _NOTE.pack_into(note, 0, _NOTHING, 0.0)
        return note

    def _collect(self) -> None:
        """Turn the notes of dead processes into strikes. Two processes that do so at once count a death once."""
        for path in self._folder.glob("*.note"):
            pid, _, started = path.stem.partition("-")
            if _started(int(pid)) == started:
                continue
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                content = path.read_bytes()
                row = _NOTE.unpack(content)[0] if len(content) == _NOTE.size else _NOTHING
                if row != _NOTHING:
                    (self._folder / f"{row}-{path.stem}.strike").touch()
                path.unlink()

    def _watch(self) -> None:
        """End this process when one image takes `hang_s`: nothing else stops C code that never returns."""
        while not self._closed.wait(min(_WATCH_S, self._hang_s / 2)):
            row, since = _NOTE.unpack_from(self._note, 0)
            if row != _NOTHING and time.monotonic() - since > self._hang_s:
                message = f"row {row}: a decoder hangs for {self._hang_s:g} s; this worker ends and the row fails\n"
                os.write(sys.stderr.fileno(), message.encode())
                os._exit(1)


def _started(pid: int) -> str:
    """When a process started, in whole seconds; empty if there is none. Tells a reused process id."""
    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except psutil.Error:
        return ""
