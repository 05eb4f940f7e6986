"""The side of a test server that runs in its own process: say where it listens, and end with the tests."""

import os
import sys
import threading

READY = "READY "


def announce(url: str) -> None:
    """Tell `support.processes.serving`, which reads the log, that the server answers at `url`."""
    print(f"{READY}{url}", flush=True)


def end_with_parent() -> None:
    """End this process when its standard input closes, which the kernel sees to even if the tests are killed."""
    threading.Thread(target=_wait_for_end_of_input, daemon=True).start()


def _wait_for_end_of_input() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)
