"""Addresses of files: their scheme, what lies behind what, and the form in which one is kept."""

import os
import re

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

# These hold their objects themselves, so that no address that begins with one is a chain, whatever its key holds.
NO_CHAINS = frozenset({"s3", "gs", "http"})
# These keep copies of what the address behind them leads to, and have no paths of their own: `simplecache::s3://b/k`.
CACHES = frozenset({"simplecache", "filecache", "blockcache", "cached"})
_PACKAGE = re.compile(r"^(?:file://)?/.*/runtime_resources/working_dir_files/[^/]+(?:/|$)")
ALIASES = {"gcs": "gs", "s3a": "s3", "https": "http", "local": "file"}


def scheme(url: str) -> str:
    """`file`, `s3`, `gs`, `http`, …; aliases such as `https`, `s3a` and `gcs` folded into one name."""
    protocol = str(get_protocol(small_scheme(url)))
    return ALIASES.get(protocol, protocol)


def small_scheme(url: str) -> str:
    """`url` with its scheme in small letters, as fsspec knows it; `HTTPS://` is the same (RFC 3986, 3.1)."""
    kind, mark, place = url.partition("://")
    return f"{kind.lower()}{mark}{place}" if mark and kind.isalnum() else url


def is_chained(url: str) -> bool:
    """Whether `url` names one file system inside another, as `zip://a.png::s3://bucket/x.zip` does."""
    return "::" in url and scheme(url) not in NO_CHAINS


def behind_caches(url: str) -> str:
    """`s3://b/k` of `simplecache::s3://b/k`."""
    cache, _, behind = url.partition("::")
    return behind_caches(behind) if cache in CACHES else url


def file_name(url: str) -> str:
    """The last segment of what `url` names: in front of the archive that this lies in, of a query and of a fragment."""
    url = behind_caches(url)
    # A path on a disk may hold `::`.
    path = url if url.startswith("/") or not is_chained(url) else url.partition("::")[0]
    if scheme(url) == "http":
        # By hand: what is no address, such as `http://[abc/a.jpg`, is a row too.
        path = re.split("[?#]", url, maxsplit=1)[0].partition("://")[2].partition("/")[2]
    return path.rpartition("/")[2]


def absolute(url: str) -> str:
    """`url` in a form that means the same place in every process of this machine: local paths become absolute, read as
    `filesystem` reads them (`~`, `file:`, `local:`), also where another file system lies in a local file."""
    if is_chained(url):
        inside, mark, place = url.rpartition("::")
        local = "file://" if "://" in place else ""
        return f"{inside}{mark}{local}{absolute(place)}" if scheme(place) == "file" else url
    return os.path.abspath(LocalFileSystem._strip_protocol(small_scheme(url))) if scheme(url) == "file" else url


def lasting(url: str) -> str:
    """`url` as it is recorded: absolute, but relative where it lies in what a Ray job brought along (`--working-dir`),
    whose folder is named by its content and is another one for the next job."""
    inside, mark, place = absolute(url).rpartition("::")
    return f"{inside}{mark}{place and (_PACKAGE.sub('', place) or '.')}"


def real_name(path: str) -> str:
    """The file that is shown as `path`: in manifests a byte of a name that is no UTF-8 stands as `\\udcXX`."""
    return re.sub(r"\\udc([89a-f][0-9a-f])", lambda shown: chr(0xDC00 + int(shown[1], 16)), path)


def join(base: str, *names: str) -> str:
    """`base/name/…`, for paths and URLs alike."""
    return "/".join([base.rstrip("/"), *names])
