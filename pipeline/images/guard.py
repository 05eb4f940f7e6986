"""Remember which image a process was decoding when it died, so that it is not tried for ever.

Before an image is decoded, its row is noted in a small memory-mapped file of this process. The notes of processes
that are gone are read by the next `CrashGuard` over the same folder: each is a strike against a row. A row with a
strike is decoded in a process of its own (`isolated`), where its death is harmless and certain.
"""

import contextlib
import mmap
import os
import shutil
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.processes import is_same, process_mark

_NOTE = struct.Struct("<qd")  # row or -1, monotonic time of its start
_NOTHING = -1
# A decoder that hangs inside C for this long is ended with its process; time_limit has had its turn long before.
HANG_S = 300.0
_WATCH_S = 5.0
_TRIES = 100


class CrashGuard:
    """Notes and strikes of one run on one machine, in a folder of the run's own on a local disk.

    At most one at a time in a process. Raises OSError when the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], *, hang_s: float = HANG_S) -> None:
        self._folder = Path(folder)
        self._hang_s = hang_s
        self._path, self._note = _open_note(self._folder)
        self._collect()
        self._strikes = Counter(int(path.name.partition("-")[0]) for path in self._folder.glob("*.strike"))
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="decode-watch", daemon=True).start()

    def close(self) -> None:
        """Take back the note of this process and stop watching. The last one out takes the folder along."""
        self._closed.set()
        _NOTE.pack_into(self._note, 0, _NOTHING, 0.0)
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are at work, or strikes are to be kept
            self._folder.rmdir()

    @staticmethod
    def note(row: int) -> bytes:
        """What the file of a process says while it decodes `row`."""
        return _NOTE.pack(row, time.monotonic())

    def strikes(self, row: int) -> int:
        """How many processes had died while they decoded `row` when this guard was made."""
        return self._strikes[row] if self._strikes else 0

    @contextlib.contextmanager
    def noted(self, row: int) -> Iterator[None]:
        """While the block runs, the death of this process is a strike against `row`."""
        self._note[:] = self.note(row)
        try:
            yield
        finally:
            _NOTE.pack_into(self._note, 0, _NOTHING, 0.0)

    def _collect(self) -> None:
        """Turn the notes of dead processes into strikes. Two processes that do so at once count a death once."""
        for path in self._folder.glob("*.note"):
            pid, _, mark = path.stem.partition("-")
            if is_same(int(pid), mark or None):
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


def forget(folder: str | os.PathLike[str]) -> None:
    """Drop what is kept about a run that has ended, on this machine."""
    shutil.rmtree(folder, ignore_errors=True)


def _open_note(folder: Path) -> tuple[Path, mmap.mmap]:
    pid = os.getpid()
    path = folder / f"{pid}-{process_mark(pid) or ''}.note"
    with _created(path) as file:
        # Not a hole, as `truncate` makes one: on a full disk what is written to it through the map is a SIGBUS.
        os.posix_fallocate(file.fileno(), 0, _NOTE.size)
        note = mmap.mmap(file.fileno(), _NOTE.size)
    _NOTE.pack_into(note, 0, _NOTHING, 0.0)
    return path, note


def _created(path: Path) -> BinaryIO:
    for _ in range(_TRIES):
        # Not `exist_ok`, which looks again at what stood there. Another process may just have taken it along, empty.
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(parents=True)
        with contextlib.suppress(FileNotFoundError):
            return path.open("a+b")
    raise OSError(f"{path.parent} is taken away again and again while a note is to be put there")
