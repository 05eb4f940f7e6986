"""gcp-storage-emulator in its own process, mended where clients rely on what it lacks. Run by `gcs`.

Added: pages of a listing (`maxResults`, `pageToken`, `startOffset`, `endOffset`), `ifGenerationMatch` (without it every
exclusive write succeeds), ranges from the end and 416 for impossible ones, `moveTo`, cancelling an upload, HTTP/1.1
connections that stay open, threads. Mended: an upload whose last byte is a carriage return lost it. Left out: soft
deletion, and the index file that was written anew for every object.
"""

import base64
import functools
import io
import json
import re
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator import settings, storage
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from support.child import announce, end_with_parent
from support.fault_server import read_body
from support.http_child import byte_range
from support.ports import LOOPBACK

Handle = Callable[[Any, Any, Any], None]
_CANCELLED = SimpleNamespace(value=499, phrase="Client Closed Request")


def list_page(request: Any, response: Any, store: Any) -> None:
    """`objects.list`: items and prefixes in one order, a page at a time (JSON API reference)."""
    query = {name: values[0] for name, values in request.query.items()}
    try:
        items, prefixes = store.get_file_list(
            request.params["bucket_name"], query.get("prefix"), query.get("delimiter"), query.get("matchGlob")
        )
    except NotFound:
        _error(response, HTTPStatus.NOT_FOUND, "The specified bucket does not exist.")
        return
    after = base64.b64decode(query["pageToken"]).decode() if "pageToken" in query else ""
    entries = sorted([(item["name"], item) for item in items] + [(name, None) for name in prefixes], key=lambda e: e[0])
    entries = [
        (name, item)
        for name, item in entries
        if name > after
        and name >= query.get("startOffset", "")
        and ("endOffset" not in query or name < query["endOffset"])
    ]
    page = entries[: min(int(query.get("maxResults", 1000)), 1000)]
    answer: dict[str, Any] = {"kind": "storage#objects"}
    if len(page) < len(entries):
        answer["nextPageToken"] = base64.b64encode(page[-1][0].encode()).decode()
    if items := [item for _, item in page if item is not None]:
        answer["items"] = items
    if prefixes := [name for name, item in page if item is None]:
        answer["prefixes"] = prefixes
    response.json(answer)


def if_generation_matches(handle: Handle) -> Handle:
    """The handler, after a look at `ifGenerationMatch`; 0 means that no such object may exist."""

    @functools.wraps(handle)
    def checked(request: Any, response: Any, store: Any) -> None:
        wanted = request.query.get("ifGenerationMatch", [None])[0]
        if wanted is not None and wanted != _generation(store, *_destination(request)):
            message = "At least one of the pre-conditions you specified did not hold."
            _error(response, HTTPStatus.PRECONDITION_FAILED, message)
            return
        handle(request, response, store)

    return checked


def _destination(request: Any) -> tuple[str, str]:
    params = request.params
    if "dest_object_id" in params:
        return params.get("dest_bucket_name", params["bucket_name"]), params["dest_object_id"]
    if "object_id" in params:
        return params["bucket_name"], params["object_id"]
    name = request.query["name"][0] if "name" in request.query else request.data["meta"]["name"]
    return params["bucket_name"], name


def _generation(store: Any, bucket: str, name: str) -> str:
    try:
        return str(store.get_file_obj(bucket, name)["generation"])
    except NotFound:
        return "0"


def with_ranges(handle: Handle) -> Handle:
    """The download, with every single range of RFC 9110 brought to the one form that the emulator reads."""

    @functools.wraps(handle)
    def ranged(request: Any, response: Any, store: Any) -> None:
        headers = request._request_handler.headers
        if "Range" in headers:
            try:
                size = len(store.get_file(request.params["bucket_name"], request.params["object_id"], False))
            except NotFound:
                _error(response, HTTPStatus.NOT_FOUND, "No such object.")
                return
            wanted = byte_range(headers["Range"], size)
            if wanted is None:
                response["Content-Range"] = f"bytes */{size}"
                _error(response, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "Request range not satisfiable")
                return
            headers.replace_header("Range", f"bytes={wanted[0]}-{wanted[1] - 1}")
        handle(request, response, store)

    return ranged


def move(request: Any, response: Any, store: Any) -> None:
    """`objects.move`: another name in the same bucket."""
    bucket, name, target = (request.params[key] for key in ("bucket_name", "object_id", "dest_object_id"))
    try:
        moved = objects._copy(request.base_url, store, bucket, name, bucket, target)
    except NotFound:
        _error(response, HTTPStatus.NOT_FOUND, "No such object.")
        return
    store.delete_file(bucket, name)
    response.json(moved)


def cancel_upload(request: Any, response: Any, store: Any) -> None:
    """DELETE on a resumable upload; the answer is 499."""
    store.resumable.pop(request.query["upload_id"][0], None)
    response.status = _CANCELLED


def _error(response: Any, status: HTTPStatus, message: str) -> None:
    response.status = status
    response.json({"error": {"code": status.value, "message": message}})


def read_related(content_type: str, raw: bytes) -> dict[str, Any]:
    """The two parts of a multipart/related upload (RFC 2387). gcsfs ends lines with a bare line feed."""
    boundary = re.search(r'boundary="?([^";]+)"?', content_type)
    if boundary is None:
        raise ValueError(f"no boundary in {content_type!r}")
    line = b"--" + boundary[1].encode()
    newline = b"\r\n" if raw.startswith(line + b"\r\n") else b"\n"
    _, head, rest = raw.split(line + newline, 2)
    data_head, _, data = rest.partition(newline * 2)
    content = data[: data.rindex(newline + line + b"--")]
    kind = re.search(rb"(?i)content-type:\s*([^\s;]+)", data_head)
    return {
        "meta": json.loads(head.partition(newline * 2)[2]),
        "content": content,
        "content-type": kind[1].decode() if kind else "application/octet-stream",
    }


def _read_data(read: Callable[[Any, Any], Any], handler: Any, query: Any) -> Any:
    content_type = handler.headers.get("Content-Type") or ""
    if not content_type.startswith("multipart/related"):
        return read(handler, query)
    return read_related(content_type, handler.rfile.read())


_LOCK = threading.Lock()


class Handler(emulator.RequestHandler):  # type: ignore[misc]
    """One request at a time, read before and answered after it: the storage knows no threads."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    rfile: Any
    wfile: Any

    def handle_any(self) -> None:
        stream, out = self.rfile, self.wfile
        body = read_body(stream, {name.lower(): value for name, value in self.headers.items()})
        del self.headers["Transfer-Encoding"], self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(body))
        self.rfile, self.wfile = io.BytesIO(body), io.BytesIO()
        try:
            with _LOCK:
                emulator.Router(self).handle(self.command)
            out.write(self.wfile.getvalue())
        finally:
            self.rfile, self.wfile = stream, out

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def mend() -> None:
    """Put the functions above into the emulator's tables."""
    replaced: dict[Any, Handle] = {
        objects.ls: list_page,
        objects.download: with_ranges(objects.download),
        **{
            handle: if_generation_matches(handle)
            for handle in (objects.insert, objects.upload_partial, objects.copy, objects.rewrite, objects.delete)
        },
    }
    routes = [(regex, {m: replaced.get(h, h) for m, h in methods.items()}) for regex, methods in emulator.HANDLERS]
    upload = rf"^{settings.UPLOAD_API_ENDPOINT}/b/(?P<bucket_name>[-.\w]+)/o$"
    next(methods for regex, methods in routes if regex == upload)["DELETE"] = cancel_upload
    moving = (
        rf"^{settings.API_ENDPOINT}/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$"
    )
    emulator.HANDLERS = ((moving, {"POST": if_generation_matches(move)}), *routes)
    objects.download = replaced[objects.download]  # `objects.get` calls it by name
    emulator._read_data = functools.partial(_read_data, emulator._read_data)
    storage.DEFAULT_SOFT_DELETE_RETENTION_SECONDS = 0
    storage.Storage._write_config_to_file = lambda self: None


if __name__ == "__main__":
    mend()
    store = storage.Storage(use_memory_fs=True)
    server = Server((LOOPBACK, 0), functools.partial(Handler, store))
    end_with_parent()
    announce(f"http://{LOOPBACK}:{server.server_port}")
    server.serve_forever()
