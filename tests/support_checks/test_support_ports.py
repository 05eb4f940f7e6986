"""A program that is told a port is started again on another where somebody took the first in between."""

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ports import LOOPBACK, free_port, is_open, tried_again
from support.processes import running

LISTENING = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(60)"


@contextlib.contextmanager
def listening(port: int, taken: int, log_dir: Path) -> Iterator[int]:
    with running(
        [sys.executable, "-c", LISTENING, str(port)],
        name="listening",
        log_dir=log_dir,
        ready=lambda process: port != taken and is_open(port),
    ):
        yield port


def test_a_port_taken_in_between_is_left_to_its_owner(tmp_path: Path) -> None:
    free = free_port()
    with socket.create_server((LOOPBACK, 0)) as owner, contextlib.ExitStack() as stack:
        taken = owner.getsockname()[1]
        chosen = [free, taken, taken]
        assert tried_again(lambda: stack.enter_context(listening(chosen.pop(), taken, tmp_path))) == free
        with pytest.raises(RuntimeError, match="already in use"):
            tried_again(lambda: stack.enter_context(listening(taken, taken, tmp_path)), tries=2)
