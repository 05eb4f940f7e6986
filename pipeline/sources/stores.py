"""The objects of a store, page by page: local disks, S3, Google Cloud Storage, web servers' index pages, any other."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from html.entities import html5
from html.parser import HTMLParser
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from fsspec import AbstractFileSystem
from fsspec.asyn import sync

from pipeline.sources.reading import patiently

_PAGE = 1000

# Whether a folder may hold something that is wanted; spares the walk through what cannot.
Enter = Callable[[str], bool]


class Entry(NamedTuple):
    """One object. `etag` changes when the content does; None where the store has no such thing."""

    uri: str
    size: int | None
    etag: str | None


def local_entry(path: str) -> Entry:
    """The file at `path` (absolute). A link that leads nowhere is an entry too: it fails when it is read."""
    try:
        status = os.stat(path)
    except OSError:
        return Entry(path, None, None)
    return Entry(path, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}")


def walk_local(folder: str, enter: Enter = lambda path: True) -> Iterator[Entry]:
    """Every file below `folder` (absolute), by name, a folder's files before its subfolders'.

    Links are followed, except one that leads back to a folder it lies in.
    """
    stack: list[tuple[str, frozenset[str]]] = [(folder, frozenset())]
    while stack:
        place, above = stack.pop()
        real = os.path.realpath(place)
        if real in above:
            continue
        files, folders = _scan(place)
        for name in files:
            yield local_entry(os.path.join(place, name))
        below = (os.path.join(place, name) for name in reversed(folders))
        stack += [(path, above | {real}) for path in below if enter(path)]


def _scan(folder: str) -> tuple[list[str], list[str]]:
    """Names of files and of folders. An unreadable folder is an error: its files would be missing unnoticed."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as found:
        for item in found:
            (folders if _is_folder(item) else files).append(item.name)
    return sorted(files), sorted(folders)


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError as error:
        # A link in a circle or through a file leads nowhere: its row will say so.
        if error.errno in {errno.ELOOP, errno.ENOTDIR}:
            return False
        raise


def list_s3(fs: AbstractFileSystem, bucket: str, prefix: str) -> Iterator[Entry]:
    """Objects whose key begins with `prefix`, by key. A folder marker (`key/`) is no object."""
    token: dict[str, str] = {}
    while True:
        page = fs.call_s3(
            "list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=_PAGE, **token, **getattr(fs, "req_kw", {})
        )
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):
                yield Entry(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def list_gcs(fs: AbstractFileSystem, bucket: str, prefix: str) -> Iterator[Entry]:
    """As `list_s3`."""
    token: dict[str, str] = {}
    while True:
        page: dict[str, Any] = fs.call("GET", "b/{}/o", bucket, prefix=prefix, maxResults=_PAGE, json_out=True, **token)
        for item in page.get("items", []):
            if not item["name"].endswith("/"):
                etag = item.get("md5Hash") or item.get("crc32c") or item.get("etag")  # composite objects have no MD5
                yield Entry(f"gs://{bucket}/{item['name']}", int(item["size"]), etag)
        if not page.get("nextPageToken"):
            return
        token = {"pageToken": page["nextPageToken"]}


def crawl(fs: AbstractFileSystem, url: str, enter: Enter = lambda path: True) -> Iterator[Entry]:
    """Every file that the index page at `url`, and those of the folders below it, link to.

    Links out of the folder, and those that only sort the page anew (`?C=M;O=A`), do not count.
    """
    stack, seen = [url], {url}
    while stack:
        page = stack.pop()
        links = sorted(_links(fs, page))
        folders = [link for link in links if link.endswith("/") and link not in seen and enter(link)]
        yield from (Entry(link, None, None) for link in links if not link.endswith("/"))
        seen.update(folders)
        stack += reversed(folders)


async def _text_of(fs: Any, page: str) -> str:
    session = await fs.set_session()
    async with session.get(fs.encode_url(page), **fs.kwargs) as response:
        fs._raise_not_found_for_status(response, page)
        kind = response.headers.get("Content-Type", "text/html").partition(";")[0]
        return str(await response.text(errors="ignore")) if kind == "text/html" else ""


# In an attribute `&not` is a reference, but not where a letter, a digit or `=` follows (HTML standard, 13.2.5.73).
_WITHOUT_END = re.compile(r"&([A-Za-z0-9]+)(?![A-Za-z0-9;])(=?)")


def _as_text(found: re.Match[str]) -> str:
    name, assigned = found.groups()
    return found[0] if name in html5 and not assigned else f"&amp;{name}{assigned}"


class _Anchors(HTMLParser):
    """What the `href` of each `<a>` says, its character references (`&amp;`) resolved."""

    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.hrefs += [value.strip() for name, value in attrs if name == "href" and value]

    def parse_html_declaration(self, i: int) -> int:
        """Any `<!…>` ends at its `>`, but for comments: the parser of the library raises at some."""
        if self.rawdata.startswith("<!--", i):
            return self.parse_comment(i)
        end = self.rawdata.find(">", i)
        return end + 1 if end >= 0 else -1


def _links(fs: AbstractFileSystem, page: str) -> set[str]:
    anchors = _Anchors()
    text = patiently(page, lambda: sync(fs.loop, _text_of, fs, page))
    anchors.feed(_WITHOUT_END.sub(_as_text, text))
    anchors.close()
    folder, found = urljoin(page, "."), set()
    for href in anchors.hrefs:
        with contextlib.suppress(ValueError):  # brackets that are no host's: it leads nowhere
            link = urljoin(page, href)
            if link.startswith(folder) and not urlsplit(link).query and not urlsplit(link).fragment:
                # Joining tidies what is above (`//`, `..`); the server is asked as the page was named.
                found.add(page + link.removeprefix(folder))
    return found


def walk_any(fs: AbstractFileSystem, base: str, address: Callable[[str], str]) -> Iterator[Entry]:
    """Files below `base` on any other file system. `address` of a path on it is what opens it again."""
    known = fs.info(base)
    if known["type"] == "file":
        yield _any_entry(known, address)
        return
    for _, _, files in fs.walk(base, detail=True, on_error="raise"):
        for _, info in sorted(files.items()):
            yield _any_entry(info, address)


def _any_entry(info: dict[str, Any], address: Callable[[str], str]) -> Entry:
    keys = ("ETag", "etag", "md5", "checksum", "CRC", "mtime", "modified", "created")
    etag = next((str(info[key]) for key in keys if info.get(key)), None)
    return Entry(address(info["name"]), info.get("size"), etag)
