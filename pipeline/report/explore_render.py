"""What the pages of `explore` are made of: responses, addresses, grids of pictures, and page numbers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import numpy as np

from pipeline.report.explore_state import Exploration, Ints
from pipeline.report.text import environment, short_name
from pipeline.storage import redact

PICTURES_A_PAGE = 60

Query = Mapping[str, str]


@dataclass(frozen=True)
class Response:
    """What goes back over HTTP."""

    body: bytes
    content_type: str = "text/html; charset=utf-8"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class NotThere(Exception):
    """The address names nothing; the message is shown with status 404."""


def message(at: Exploration, title: str, text: str, status: int) -> Response:
    """A page with one sentence on it."""
    return render(at, "explore_message.html", title, status=status, text=text)


def link(path: str, /, **parameters: object) -> str:
    """An address of this server; parameters that are empty or None are left out."""
    given = {name: value for name, value in parameters.items() if value not in (None, "")}
    return f"{path}?{urlencode(given)}" if given else path


def render(at: Exploration, template: str, title: str, *, here: str = "", status: int = 200, **names: Any) -> Response:
    """A page from a template; `here` is the entry of the menu it belongs to, `names` are what the template needs."""
    menu = [("/", "Pictures", True), ("/clusters", "Clusters", bool(at.clusterings))]
    menu += [("/duplicates", "Near-duplicates", bool(at.duplicates)), ("/failures", "Failures", True)]
    html = (
        environment()
        .get_template(template)
        .render(
            title=title,
            run_name=f"{redact(at.run.record.model.name)} on {redact(at.run.url)}",
            here=here,
            menu=[(path, name) for path, name, there in menu if there],
            uploadable=at.searcher is not None and at.searcher.embed is not None,
            searchable=at.searcher is not None,
            by_text=at.searcher is not None and at.searcher.texts is not None,
            link=link,
            **names,
        )
    )
    return Response(html.encode(), status=status)


@dataclass(frozen=True)
class Tile:
    """One picture in a grid. `value` is a cosine, a distance or a mark such as "kept"."""

    row: int
    name: str
    label: str | None
    value: str


def make_tiles(at: Exploration, rows: Ints, values: Iterable[str] | None = None) -> list[Tile]:
    """A tile for each of `rows`, in their order; `values` stand below them, the scores of their labels if not given."""
    uris = at.thumbnails.uris(rows.tolist())
    shown = [_score(at, row) for row in rows.tolist()] if values is None else list(values)
    return [
        Tile(row, short_name(uris.get(row, f"row {row}")), at.scan.label(row), value)
        for row, value in zip(rows.tolist(), shown, strict=True)
    ]


def _score(at: Exploration, row: int) -> str:
    score = at.scan.scores[row]
    return f"{score:.3f}" if np.isfinite(score) else ""


@dataclass(frozen=True)
class Pager:
    """Where one is in a list of pages, and the addresses around; None where there is nothing to go to."""

    page: int
    pages: int
    total: int
    first: str | None
    previous: str | None
    next: str | None
    last: str | None


def paginate(total: int, size: int, query: Query, path: str) -> tuple[Pager, slice]:
    """The pager and the slice of the page that `query` asks for; a page beyond the last is the last."""
    pages = max(1, -(-total // size))
    page = min(max(1, whole_number(query, "page", 1)), pages)
    others = {name: value for name, value in query.items() if name != "page"}

    def to(number: int, there: bool) -> str | None:
        return link(path, **others, page=number) if there else None

    before, after = page > 1, page < pages
    pager = Pager(page, pages, total, to(1, before), to(page - 1, before), to(page + 1, after), to(pages, after))
    return pager, slice((page - 1) * size, page * size)


def whole_number(query: Query, name: str, default: int | None = None) -> int:
    """The number `name` of an address, `default` where it has none. Raises NotThere where there is no default."""
    text = query.get(name, "")
    if text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    if default is None:
        raise NotThere(f"This address needs a number `{name}`.")
    return default
