"""A server of `explore` on a free port, and what talks to it."""

import http.client
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import numpy as np
from report.album import Album, nearest_by_cosine
from report.html_page import Page

from pipeline.report.explore_server import ExploreServer
from pipeline.report.explore_state import Exploration, Searcher
from schemas.errors import ImageError


@contextmanager
def serving(exploration: Exploration, host: str = "127.0.0.1", token: str | None = None) -> Iterator[ExploreServer]:
    with ExploreServer(exploration, host, 0, token) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)
            exploration.close()


def searcher_of(album: Album) -> Searcher:
    place = {row: index for index, row in enumerate(album.rows)}

    def embed(data: bytes) -> np.ndarray:
        if not data.startswith(b"\xff\xd8"):
            raise ImageError("decode", "NotAnImage", "this is <b>no</b> picture")
        return album.features[len(data) % 3]

    return Searcher(
        "cls",
        lambda row: album.features[place[row]] if row in place else None,
        nearest_by_cosine(album.rows, album.features),
        embed,
    )


class Client:
    def __init__(self, server: ExploreServer) -> None:
        self.port = int(server.server_address[1])

    def request(
        self, target: str, *, method: str = "GET", body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, target, body, dict(headers or {}))
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def page(self, path: str, **query: object) -> Page:
        status, headers, body = self.request(f"{path}?{urlencode(query)}" if query else path)
        assert status == 200, body
        assert headers["content-type"] == "text/html; charset=utf-8"
        return Page(body.decode())

    def upload(self, data: bytes, name: str = "a.jpg", headers: Mapping[str, str] | None = None) -> Any:
        boundary = "----boundary7"
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        body = head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={boundary}", **(headers or {})}
        return self.request("/search", method="POST", body=body, headers=kind)
