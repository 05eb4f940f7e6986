"""What a single decode may do to its process: how long it takes, and what it writes to the log."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

DECODE_LIMIT_S = 60.0
# Parameters of mallopt(3), by their numbers in malloc.h.
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 64 << 20
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 2 << 20


class DecodeTimeoutError(Exception):
    """Decoding was interrupted."""


def steady_memory() -> None:
    """Let glibc give freed blocks of 2 MiB and more back to the system at once, and keep the small ones.

    By default it raises that size to 32 MiB as such blocks are freed, and the files and pictures that come and go in
    many threads then leave holes that add up to gigabytes. Fixing the size also fixes the other threshold, at which
    the top of the heap is given back, so low that each picture would pay dozens of page faults: hence both.

    For a process that only decodes: a forward pass takes its activations anew for each batch, and would pay for every
    page of them.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what runs in the block after `seconds`, if it lets itself be interrupted.

    Only the main thread can be interrupted, and only between calls into C. Elsewhere, and inside one long call,
    this does nothing; `guard.CrashGuard` watches over those. An alarm that was set before goes off when it was due, or
    as the block ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _interrupt)
    # Repeated, because a decoder may swallow the first exception.
    started = time.monotonic()
    due_s, again_s = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if due_s:
            signal.setitimer(signal.ITIMER_REAL, max(due_s - (time.monotonic() - started), 1e-6), again_s)


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise DecodeTimeoutError


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drop what C code writes to file descriptor 2 in the block: libtiff comments on every damaged tag."""
    with _STDERR:
        sys.stderr.flush()
        saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(nowhere)


_STDERR = threading.Lock()
