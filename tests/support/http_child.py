"""A folder over HTTP, as a web server of the wild serves it: ranges, validators, index pages. Run by `http_server`."""

import email.utils
import html
import json
import mimetypes
import re
import sys
from pathlib import Path
from urllib.parse import quote, unquote

from support.fault_server import Answer, Request, serve
from support.faults import FaultPlan

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def answer_from(folder: Path, request: Request) -> Answer:
    """The answer to a GET or HEAD request for a file or folder under `folder`."""
    if request.method not in ("GET", "HEAD"):
        return Answer(405, {"Allow": "GET, HEAD"})
    path = request.target.partition("?")[0]
    place = (folder / unquote(path).lstrip("/")).resolve()
    if place != folder and folder not in place.parents:
        return Answer(403)
    if place.is_dir():
        return _index(place) if path.endswith("/") else Answer(301, {"Location": f"{path}/"})
    return _file(place, request) if place.is_file() else Answer(404, {"Content-Type": "text/plain"}, b"not found\n")


def _index(folder: Path) -> Answer:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    lines = [f'<li><a href="{html.escape(quote(name))}">{html.escape(name)}</a></li>' for name in names]
    page = "<html><body><ul>\n" + "\n".join(lines) + "\n</ul></body></html>\n"
    return Answer(200, {"Content-Type": "text/html; charset=utf-8"}, page.encode())


def _file(place: Path, request: Request) -> Answer:
    status = place.stat()
    size = status.st_size
    headers = {
        "Content-Type": mimetypes.guess_type(place.name)[0] or "application/octet-stream",
        "ETag": f'"{status.st_mtime_ns:x}-{size:x}"',
        "Last-Modified": email.utils.formatdate(status.st_mtime, usegmt=True),
        "Accept-Ranges": "bytes",
    }
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Answer(304, headers)
    start, end = 0, size
    if "range" in request.headers:
        wanted = byte_range(request.headers["range"], size)
        if wanted is None:
            return Answer(416, {**headers, "Content-Range": f"bytes */{size}"})
        start, end = wanted
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    code = 206 if "Content-Range" in headers else 200
    if request.method == "HEAD":
        return Answer(code, headers, length=end - start)
    with place.open("rb") as file:
        file.seek(start)
        return Answer(code, headers, file.read(end - start))


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """Start and end (exclusive) of a single range (RFC 9110, 14.1.2); None if it cannot be satisfied."""
    match = _RANGE.fullmatch(header.strip())
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        return (max(0, size - int(last)), size) if int(last) and size else None
    start = int(first)
    end = min(size, int(last) + 1) if last else size
    return (start, end) if start < end else None


if __name__ == "__main__":
    root = Path(sys.argv[1]).resolve()
    serve(lambda request: answer_from(root, request), FaultPlan(json.loads(sys.argv[2])))
