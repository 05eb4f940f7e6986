"""An HTTP/1.1 server whose answers come from one function and are spoilt according to a plan of faults.

Its own paths, never spoilt and never counted: `GET /__stats__`, `POST /__plan__` (other rules), `POST /__forget__`
(empty statistics).
"""

import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support.child import announce, end_with_parent
from support.faults import Dialect, FaultPlan, Rule, error_body
from support.ports import LOOPBACK

_TICK_S = 0.05
_PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b""


@dataclass(frozen=True)
class Answer:
    """`length` is what a HEAD request hears; otherwise the length of the body."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    length: int | None = None


def serve(answer: Callable[[Request], Answer], plan: FaultPlan, dialect: Dialect = "plain") -> None:
    """Listen on a free port of the loopback interface, announce it, and answer until the parent is gone."""

    class Handler(_Handler):
        pass

    Handler.answer = staticmethod(answer)
    Handler.plan = plan
    Handler.dialect = dialect
    with _Server((LOOPBACK, 0), Handler) as server:
        end_with_parent()
        announce(f"http://{LOOPBACK}:{server.server_port}")
        server.serve_forever()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away is what many tests are about, and no error here.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    answer: Callable[[Request], Answer]
    plan: FaultPlan
    dialect: Dialect

    def handle_any(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, read_body(self.rfile, headers))
        if request.target in _CONTROL:
            _send(self, request, _control(self.plan, request), None)
            return
        rule = self.plan.enter(request.method, request.target, headers.get("range"))
        try:
            _respond(self, request, rule)
        finally:
            self.plan.leave()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = handle_any

    def log_message(self, format: str, *args: Any) -> None:
        print(f"{self.command} {self.path} {args[1] if len(args) > 1 else format % args}", flush=True)


def read_body(stream: Any, headers: Mapping[str, str]) -> bytes:
    """The body of a request, whose header names are in lower case: by its length, or in chunks (RFC 9112, 7.1)."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return bytes(stream.read(int(headers.get("content-length") or 0)))
    pieces = []
    while size := int(stream.readline().split(b";")[0], 16):
        pieces.append(stream.read(size))
        stream.readline()
    while stream.readline().strip():
        pass  # trailers
    return b"".join(pieces)


_CONTROL = ("/__stats__", "/__plan__", "/__forget__")


def _control(plan: FaultPlan, request: Request) -> Answer:
    if request.target == "/__plan__":
        plan.replace(json.loads(request.body))
    elif request.target == "/__forget__":
        plan.forget()
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(plan.stats()).encode())


def _respond(handler: _Handler, request: Request, rule: Rule | None) -> None:
    if rule is not None and rule.fault == "ignore_range":
        request = replace(request, headers={k: v for k, v in request.headers.items() if k != "range"})
    reached = rule is None or rule.reaches_upstream
    answer = handler.answer(request) if reached else Answer(502)
    if rule is not None and rule.fault == "status":
        kind, body = error_body(rule, handler.dialect)
        answer = Answer(rule.status, {"Content-Type": kind, **rule.headers}, body)
    if rule is not None and rule.fault == "reset" and not reached:
        _reset(handler)
        return
    _send(handler, request, answer, rule)


def _send(handler: _Handler, request: Request, answer: Answer, rule: Rule | None) -> None:
    fault = rule.fault if rule is not None else ""
    bodiless = request.method == "HEAD" or answer.status in (204, 304)
    if rule is not None and fault == "delay":
        time.sleep(rule.delay_s)
    if rule is not None and fault == "reset" and bodiless:
        _reset(handler)
    elif rule is not None and fault in _SPOILT_BODIES and not bodiless:
        _SPOILT_BODIES[fault](handler, answer, rule)
    else:
        length = len(answer.body) if answer.length is None else answer.length
        _head(handler, answer, {"Content-Length": str(length)})
        handler.wfile.write(b"" if bodiless else answer.body)


def _head(handler: _Handler, answer: Answer, extra: Mapping[str, str]) -> None:
    phrase = HTTPStatus(answer.status).phrase if answer.status in HTTPStatus._value2member_map_ else "Unknown"
    handler.send_response(answer.status, phrase)
    for name, value in {**answer.headers, **extra}.items():
        handler.send_header(name, value)
    handler.end_headers()


def _declare(handler: _Handler, answer: Answer, length: int | None = None) -> None:
    """The head of an answer after which the connection cannot be used again."""
    handler.close_connection = True
    size = {"Content-Length": str(length)} if length is not None else {}
    _head(handler, answer, {**size, "Connection": "close"})


def _send_reset(handler: _Handler, answer: Answer, rule: Rule) -> None:
    _declare(handler, answer, len(answer.body))
    handler.wfile.write(answer.body[: rule.after_bytes])
    _reset(handler)


def _reset(handler: _Handler) -> None:
    """Close with RST instead of FIN; the descriptor is closed here, as a shutdown would send FIN first."""
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


def _send_truncated(handler: _Handler, answer: Answer, rule: Rule) -> None:
    _declare(handler, answer, len(answer.body))
    handler.wfile.write(answer.body[: rule.after_bytes])


def _send_stalled(handler: _Handler, answer: Answer, rule: Rule) -> None:
    _declare(handler, answer, len(answer.body))
    handler.wfile.write(answer.body[: rule.after_bytes])
    while not _is_gone(handler.connection):
        time.sleep(_TICK_S)


def _is_gone(connection: socket.socket) -> bool:
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable) and not connection.recv(1, socket.MSG_PEEK)


def _send_slowly(handler: _Handler, answer: Answer, rule: Rule) -> None:
    _declare(handler, answer, len(answer.body))
    step = max(1, int(rule.bytes_per_s * _TICK_S))
    begin = time.monotonic()
    for start in range(0, len(answer.body), step):
        time.sleep(max(0.0, begin + start / rule.bytes_per_s - time.monotonic()))
        handler.wfile.write(answer.body[start : start + step])


def _send_cut(handler: _Handler, answer: Answer, rule: Rule) -> None:
    part = answer.body[: rule.after_bytes]
    _head(handler, answer, {"Content-Length": str(len(part))})
    handler.wfile.write(part)


def _send_chunked(handler: _Handler, answer: Answer, rule: Rule) -> None:
    _write_chunks(handler, answer, _pieces(answer.body, len(answer.body)))


def _send_without_length(handler: _Handler, answer: Answer, rule: Rule) -> None:
    _declare(handler, answer)
    handler.wfile.write(answer.body)


def _send_huge(handler: _Handler, answer: Answer, rule: Rule) -> None:
    pieces = _pieces(answer.body, rule.size_bytes)
    if not rule.declared:
        _write_chunks(handler, answer, pieces)
        return
    _declare(handler, answer, rule.size_bytes)
    for piece in pieces:
        handler.wfile.write(piece)


def _pieces(body: bytes, size_bytes: int) -> Iterator[bytes]:
    """`body`, then zeros, `size_bytes` in all."""
    zeros = bytes(_PIECE_BYTES)
    for start in range(0, min(size_bytes, len(body)), _PIECE_BYTES):
        yield body[start : min(start + _PIECE_BYTES, size_bytes)]
    for start in range(len(body), size_bytes, _PIECE_BYTES):
        yield zeros[: size_bytes - start]


def _write_chunks(handler: _Handler, answer: Answer, pieces: Iterator[bytes]) -> None:
    _head(handler, answer, {"Transfer-Encoding": "chunked"})
    for piece in pieces:
        handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    handler.wfile.write(b"0\r\n\r\n")


_SPOILT_BODIES: dict[str, Callable[[_Handler, Answer, Rule], None]] = {
    "reset": _send_reset,
    "truncate": _send_truncated,
    "stall": _send_stalled,
    "slow": _send_slowly,
    "cut": _send_cut,
    "chunked": _send_chunked,
    "no_length": _send_without_length,
    "huge": _send_huge,
}
