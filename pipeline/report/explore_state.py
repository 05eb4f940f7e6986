"""What `explore` keeps between requests: the scanned rows, the groups, thumbnails made, and pictures uploaded."""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from markupsafe import escape
from numpy.typing import NDArray

from pipeline.report.catalogue import Catalogue
from pipeline.report.groups import Grouping, load_clusterings, load_duplicates
from pipeline.report.lookup import RowLookup
from pipeline.report.run import RunDirectory, open_part
from pipeline.report.scan import ABSENT, ImageScan, scan_images
from pipeline.report.thumbnails import Thumbnailer
from schemas.spec import FEATURE_NAMES

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

SMALL_SIDE, LARGE_SIDE = 160, 768
_CACHE_BYTES = 64 * 1024 * 1024
_THUMBNAIL_TIMEOUT_S = 30.0
_KEPT_UPLOADS = 32


@dataclass(frozen=True)
class TextSearcher:
    """How pictures are found by words: `nearest` as that of Searcher, by the `feature` whose space texts share, which
    may hold newer rows too; `embed(text)` is a vector in it, and raises SpecError for a model without a text tower.
    `read()` reads the vectors where they are not there yet, which may take long; it raises OutputError where it cannot.
    """

    feature: str
    read: Callable[[], object]
    nearest: Callable[[Floats, int], tuple[Ints, Floats]]
    embed: Callable[[str], Floats]


@dataclass(frozen=True)
class Searcher:
    """How similar pictures are found by `feature`.

    `vector_of(row)` is the (D,) vector of a row, None where it has no direction; it raises LookupError for a row that
    came after the vectors were read. `nearest(vector, k)` gives rows and cosines, best first; `embed(data)` turns
    the bytes of a picture into a vector with the model of the run, None where the model is not at hand. `texts` is None
    where that is of a kind that has no text tower, or the run does not hold the feature it takes; whether there is one,
    the first search by text tells.
    """

    feature: str
    vector_of: Callable[[int], Floats | None]
    nearest: Callable[[Floats, int], tuple[Ints, Floats]]
    embed: Callable[[bytes], Floats] | None = None
    texts: TextSearcher | None = None


class Thumbnails:
    """Pictures by row and size, made when asked for; the last 64 MiB of them are kept."""

    def __init__(self, run: RunDirectory) -> None:
        self._source = Thumbnailer(run)
        self._kept: OrderedDict[tuple[int, int], tuple[str, bytes]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def uris(self, rows: Iterable[int]) -> dict[int, str]:
        """The addresses of `rows`, without the secrets of signed ones."""
        return self._source.uris(rows)

    def get(self, row: int, side: int) -> tuple[str, bytes]:
        """Content type and bytes: WebP, or an SVG that says why the picture cannot be shown."""
        with self._lock:
            if (row, side) in self._kept:
                self._kept.move_to_end((row, side))
                return self._kept[row, side]
        made = self._source.thumbnails([row], side, _THUMBNAIL_TIMEOUT_S)[row]
        if made.data is None:
            return "image/svg+xml", _placeholder(made.reason)
        with self._lock:
            if (row, side) not in self._kept:  # else another request made the same meanwhile
                self._kept[row, side] = ("image/webp", made.data)
                self._bytes += len(made.data)
            while self._bytes > _CACHE_BYTES:
                _, (_, oldest) = self._kept.popitem(last=False)
                self._bytes -= len(oldest)
        return "image/webp", made.data

    def close(self) -> None:
        """Stop reading."""
        self._source.close()


def _placeholder(reason: str) -> bytes:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 160 160" font-family="sans-serif" text-anchor="middle" '
        f'fill="#7d8794"><title>{escape(reason)}</title><text x="80" y="76" font-size="13">cannot be shown</text>'
        f'<text x="80" y="96" font-size="10">{escape(reason[:28])}</text></svg>'
    ).encode()


class Uploads:
    """Vectors of pictures that were searched with, under names nobody can guess; the last 32 are kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Floats] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, vector: Floats) -> str:
        """Keep `vector` and give its name."""
        name = secrets.token_urlsafe(12)
        with self._lock:
            self._kept[name] = vector
            while len(self._kept) > _KEPT_UPLOADS:
                self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> Floats | None:
        """The vector of that name, if it is still kept."""
        with self._lock:
            return self._kept.get(name)


@dataclass(frozen=True)
class Exploration:
    """One run, opened for looking through. Rows and groups that appear later are seen after a restart."""

    run: RunDirectory
    scan: ImageScan
    catalogue: Catalogue
    details: RowLookup
    thumbnails: Thumbnails
    clusterings: dict[str, Grouping]
    duplicates: dict[str, Grouping]
    uploads: Uploads
    searcher: Searcher | None
    searching: threading.Lock

    def has(self, row: int) -> bool:
        """Whether `row` is an image of this run."""
        return 0 <= row < len(self.scan.codes) and self.scan.codes[row] != ABSENT

    def close(self) -> None:
        """Stop reading pictures."""
        self.thumbnails.close()


def open_exploration(run: RunDirectory, searcher: Searcher | None) -> Exploration:
    """Read what the pages need of `run`: narrow columns, cluster and group numbers, Parquet footers."""
    scan = scan_images(run)
    return Exploration(
        run=run,
        scan=scan,
        catalogue=Catalogue(run, scan),
        details=RowLookup(run, "images", _narrow_columns(run)),
        thumbnails=Thumbnails(run),
        clusterings={item.name: item for item in load_clusterings(run, scan)},
        duplicates={item.name: item for item in load_duplicates(run, scan)},
        uploads=Uploads(),
        searcher=searcher,
        searching=threading.Lock(),
    )


def _narrow_columns(run: RunDirectory) -> list[str]:
    for path in run.parts("images")[:1]:
        with open_part(run.fs, path) as part:
            return [name for name in part.schema_arrow.names if name not in FEATURE_NAMES]
    return ["row"]
