"""HTTP around the pages of `explore`, for one person on one machine.

What guards it: the loopback address or a token; without one a check of the Host header, so that a site whose name is
made to resolve to this machine cannot read it; a content policy without scripts; limits on the size and time of a
request.
"""

import hmac
import logging
import socket
import sys
from collections.abc import Callable, Mapping
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from pipeline.report.explore_pages import PAGES, answer, search_by_picture
from pipeline.report.explore_render import Response, link, message
from pipeline.report.explore_state import Exploration
from schemas.errors import OutputError, SpecError

MAX_UPLOAD_BYTES = 32 * 1024 * 1024
_REQUEST_TIMEOUT_S = 30.0
_POLL_S = 0.2
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def check_reach(host: str, token: str | None) -> None:
    """Raise SpecError for another host than loopback without a token, or one that is too short."""
    if not is_loopback(host) and not token:
        raise SpecError(f"--host {host} can be reached from other machines; give a --token that they must know")
    if token is not None and len(token) < 8:
        raise SpecError("--token is too short; give at least 8 characters")


def check_port(host: str, port: int) -> None:
    """Raise OutputError if nobody could listen on `host:port` now."""
    try:
        with socket.socket(_family(host)) as probe:
            # As the server will: where nobody listens any more, connections that linger are no hindrance.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise _taken(host, port, error) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _taken(host: str, port: int, error: OSError) -> OutputError:
    return OutputError(f"cannot listen on {host} port {port}: {error}; give another --port")


class ExploreServer(ThreadingHTTPServer):
    """Serves one Exploration on `host:port` (0 takes a free port). With a `token` every request must carry it.

    Raises SpecError for another host than loopback without a token, OutputError if the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, exploration: Exploration, host: str, port: int, token: str | None) -> None:
        check_reach(host, token)
        self.exploration = exploration
        self.token = token
        self.address_family = _family(host)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise _taken(host, port, error) from error

    def serve_until(self, told_to_stop: Callable[[], bool]) -> None:
        """Answer requests until `told_to_stop`, which is asked after each and several times a second."""
        self.timeout = _POLL_S
        while not told_to_stop():
            self.handle_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle is nothing to report; anything else is."""
        if isinstance(sys.exception(), ConnectionError | TimeoutError):
            return
        log.exception("a request could not be answered")

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        host, port = str(self.server_address[0]), int(self.server_address[1])
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class _Handler(BaseHTTPRequestHandler):
    server: ExploreServer
    server_version = "patchstream"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    timeout = _REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True
        self._send(self._guarded() or self._get())

    do_HEAD = do_GET

    def do_POST(self) -> None:
        # The body may be left unread, so the connection cannot serve another request.
        self.close_connection = True
        self._send(self._guarded() or self._foreign() or self._post())

    def _get(self) -> Response:
        path, query = _split(self.path)
        return answer(self.server.exploration, path, query)

    def _post(self) -> Response:
        if _split(self.path)[0] != "/search":
            return self._plain(404, "There is nothing to post to at this address.")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return self._plain(411, "An upload must say how long it is.")
        if int(length) > MAX_UPLOAD_BYTES:
            self._discard(int(length))
            at = self.server.exploration
            return message(at, "Too large", f"An uploaded file may have {MAX_UPLOAD_BYTES >> 20} MiB.", 413)
        data = uploaded_file(self.headers.get("Content-Type", ""), self.rfile.read(int(length)))
        return search_by_picture(self.server.exploration, data)

    def _guarded(self) -> Response | None:
        """Why this request is refused, None if it is not."""
        # A name of another site may be made to point here; an address cannot. With a token such a site has no cookie
        # to send, and the name may be that of a proxy.
        if self.server.token is not None:
            return self._check_token(self.server.token)
        if not is_loopback(_host_name(self.headers.get("Host", "")) or ""):
            return self._plain(421, "This server answers to localhost only; behind a proxy, start it with a --token.")
        return None

    def _check_token(self, token: str) -> Response | None:
        cookie = f"patchstream_{self.server.server_address[1]}"
        path, query = _split(self.path)
        # Also from who is known already: links of a page repeat what its address holds.
        if _same(query.pop("token", ""), token):
            target = link(path if path in PAGES else "/", **query)
            keep = f"{cookie}={quote(token, safe='')}; Path=/; HttpOnly; SameSite=Lax"
            return Response(b"", status=303, headers={"Location": target, "Set-Cookie": keep})
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if _same(self._cookies().get(cookie, ""), token) or _same(bearer, token):
            return None
        return self._plain(401, "Add ?token=… with the token that this server was started with to the address.")

    def _cookies(self) -> dict[str, str]:
        # By hand: http.cookies gives up at what other applications on this host may have set.
        pairs = (item.partition("=") for item in self.headers.get("Cookie", "").split(";"))
        return {name.strip(): unquote(value.strip()) for name, _, value in pairs}

    def _foreign(self) -> Response | None:
        """A page of another site must not post here."""
        origin = self.headers.get("Origin")
        if origin is None or origin.partition("://")[2] == self.headers.get("Host"):
            return None
        return self._plain(403, "This upload comes from another site.")

    def _discard(self, length: int) -> None:
        """Read what a browser sends before it listens, within reason."""
        left = min(length, 2 * MAX_UPLOAD_BYTES)
        while left > 0 and (data := self.rfile.read(min(left, 1 << 16))):
            left -= len(data)

    def _plain(self, status: int, text: str) -> Response:
        return Response(text.encode(), "text/plain; charset=utf-8", status)

    def _send(self, response: Response) -> None:
        # Pictures too: the address of a row is the same for the next run that is looked through.
        headers = {"Cache-Control": "no-store", **_HEADERS, **response.headers}
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        self.send_header("Content-Length", str(len(response.body)))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def log_message(self, format: str, *args: Any) -> None:
        # Addresses can hold the token: only the path is logged. A connection that never asked has neither.
        log.debug("%s %s", getattr(self, "command", None), getattr(self, "path", "").partition("?")[0])


def _split(target: str) -> tuple[str, dict[str, str]]:
    """Path and parameters of a request's target; more than 32 parameters are not taken for parameters."""
    path, _, query = target.partition("?")
    return path, dict(parse_qsl(query)) if query.count("&") < 32 else {}


def _host_name(header: str) -> str | None:
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def uploaded_file(content_type: str, body: bytes) -> bytes:
    """The first file of a `multipart/form-data` body (RFC 7578), empty if there is none."""
    kind, parameters = _content_type(content_type)
    boundary = parameters.get("boundary")
    # One with a charset (`boundary*=`, RFC 2231) comes as three values; a boundary has none.
    if kind != "multipart/form-data" or not isinstance(boundary, str) or not boundary:
        return b""
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary.encode())[1:]:
        head, separator, data = part.partition(b"\r\n\r\n")
        if separator and b"filename=" in head:
            return data
    return b""


def _content_type(header: str) -> tuple[str, Mapping[str, object]]:
    parsed = Message()
    parsed["Content-Type"] = header
    return parsed.get_content_type(), dict(parsed.get_params([], "Content-Type"))
