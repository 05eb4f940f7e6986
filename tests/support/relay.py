"""A relay before a TCP server whose connections can be cut, as a port-forward's are, or die without a word."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from support.ports import LOOPBACK


class Relay:
    """Listens on `port` and passes bytes both ways. A connection over which `refused` comes is ended."""

    def __init__(self, host: str, port: int, refused: bytes = b"") -> None:
        self.refused = refused
        self.refusals = 0
        self._behind = (host, port)
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._frozen: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> int:
        """End the connections that are open; gives how many. New ones are taken as before."""
        ends, self._open = self._open, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        return len(ends) // 2

    def freeze(self) -> int:
        """Pass nothing on between the connections that are open, and leave them open; gives how many. New ones are
        taken as before."""
        self._frozen.update(self._open)
        return len(self._open) // 2

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._behind)
                self._open += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self.refused and self.refused in data:
                    self.refusals += 1
                    break
                if source not in self._frozen:
                    target.sendall(data)
        if source in self._frozen:
            return
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def relay(host: str, port: int, refused: bytes = b"") -> Iterator[Relay]:
    """A relay to `host:port` while the block lasts."""
    running = Relay(host, port, refused)
    try:
        yield running
    finally:
        running.close()
