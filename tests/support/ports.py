"""Free loopback ports, for programs that must be told one.

A server of our own binds port 0 and says which one it got (see `support/child.py`): nobody can take it in between.
"""

import contextlib
import socket
from collections.abc import Callable
from typing import TypeVar

LOOPBACK = "127.0.0.1"
T = TypeVar("T")


def free_port() -> int:
    """A port that nobody listens on now. Another process may take it before the caller does: retry if so."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def tried_again(start: Callable[[], T], tries: int = 3) -> T:
    """What `start` gives, which chooses its free ports anew each time; the last RuntimeError (see `running`) stands."""
    for _ in range(tries - 1):
        with contextlib.suppress(RuntimeError):
            return start()
    return start()


def is_open(port: int, host: str = LOOPBACK) -> bool:
    """Whether something accepts connections on the port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0
