"""A reverse proxy that passes requests on to one server, spoiling some. Run by `flaky_proxy`."""

import contextlib
import http.client
import json
import sys
from typing import cast
from urllib.parse import urlsplit

from support.fault_server import Answer, Request, serve
from support.faults import Dialect, FaultPlan

# Of one connection and not of the message (RFC 9110, 7.6.1), or set anew on the way.
_REPLACED = {
    *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect"),
    *("content-length", "date", "server"),
}


def forward(upstream: str, request: Request) -> Answer:
    """What the server behind answers. Host stays what the client said: the URLs in the answers lead back here.

    A connection for each request: a kept one may close under a write, which then could not be sent a second time.
    """
    headers = {name: value for name, value in request.headers.items() if name not in _REPLACED}
    if request.body or request.method in ("PUT", "POST", "PATCH"):
        headers["content-length"] = str(len(request.body))
    parts = urlsplit(upstream)
    with contextlib.closing(http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)) as connection:
        connection.request(request.method, request.target, body=request.body, headers=headers)
        response = connection.getresponse()
        body = response.read()
    kept = {name: value for name, value in response.getheaders() if name.lower() not in _REPLACED}
    length = response.headers.get("Content-Length")
    return Answer(response.status, kept, body, int(length) if length and request.method == "HEAD" else None)


def main(upstream: str, plan: str, dialect: Dialect) -> None:
    serve(lambda request: forward(upstream, request), FaultPlan(json.loads(plan)), dialect)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], cast(Dialect, sys.argv[3]))
