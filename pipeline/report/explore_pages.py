"""The pages of `explore`: each a function from what was asked to a response. They are made here, without scripts."""

import logging
import traceback
from collections.abc import Callable

import numpy as np

from pipeline.report import explore_groups
from pipeline.report.catalogue import ORDERS, Filter, failures_between
from pipeline.report.explore_render import (
    PICTURES_A_PAGE,
    NotThere,
    Query,
    Response,
    Tile,
    link,
    make_tiles,
    message,
    paginate,
    render,
    whole_number,
)
from pipeline.report.explore_state import LARGE_SIDE, SMALL_SIDE, Exploration, Floats, Ints
from pipeline.report.text import asset
from pipeline.storage import redact
from schemas.errors import ImageError, PatchstreamError

_NEIGHBOURS = 600
_LISTED_LABELS = 1000

log = logging.getLogger(__name__)


def answer(at: Exploration, path: str, query: Query) -> Response:
    """The response to a GET. What cannot be found or read becomes a page that says so."""
    page = PAGES.get(path)
    try:
        if page is None:
            raise NotThere("There is no page at this address.")
        return page(at, query)
    except NotThere as error:
        return message(at, "Not found", str(error), 404)
    except PatchstreamError as error:
        return message(at, "This cannot be read", str(error), 500)
    except Exception as error:  # noqa: BLE001  file systems and Parquet raise what they like
        return _unexpected(at, error)


def search_by_picture(at: Exploration, data: bytes) -> Response:
    """Embed an uploaded picture and send the browser on to what is like it."""
    if at.searcher is None or at.searcher.embed is None:
        return message(at, "No search by picture", "The model of this run is not at hand; pick a picture instead.", 404)
    if not data:
        return message(at, "No picture", "Choose a file first, then search.", 400)
    try:
        with at.searching:
            vector = at.searcher.embed(data)
    except (ImageError, PatchstreamError) as error:
        return message(at, "This file cannot be used", str(error), 400)
    except Exception as error:  # noqa: BLE001  a network that does not fit into memory, a store that is not there
        return _unexpected(at, error)
    return Response(b"", status=303, headers={"Location": link("/found", id=at.uploads.add(vector))})


def _unexpected(at: Exploration, error: Exception) -> Response:
    log.error("a request could not be answered\n%s", redact("".join(traceback.format_exception(error))))
    text = f"{type(error).__name__}: {error}. The program's own output has more; `patchstream verify` finds damage."
    return message(at, "This cannot be shown", redact(text), 500)


def pictures(at: Exploration, query: Query) -> Response:
    """All pictures, or those of a label or with a text in their address."""
    order = query.get("order", "row")
    wanted = Filter(query.get("label", ""), query.get("text", ""), order if order in ORDERS else "row")
    rows = at.catalogue.rows(wanted)
    pager, window = paginate(len(rows), PICTURES_A_PAGE, query, "/")
    counts = at.scan.label_counts()
    labels = counts[:_LISTED_LABELS]
    if wanted.label and wanted.label not in dict(labels):
        labels.append((wanted.label, dict(counts).get(wanted.label, 0)))
    return render(
        at,
        "explore_pictures.html",
        "Pictures",
        here="/",
        tiles=make_tiles(at, rows[window].astype(np.int64)),
        pager=pager,
        wanted=wanted,
        orders=ORDERS if at.scan.names else {"row": ORDERS["row"]},
        labels=labels,
    )


def picture(at: Exploration, query: Query) -> Response:
    """One picture, all that is known of it, and what is like it."""
    row = _row(at, query)
    details = at.details.get([row]).get(row, {})
    labels = details.pop("labels", None) or []
    details = {name: redact(value) if isinstance(value, str) else value for name, value in details.items()}
    memberships = [("cluster", item, index) for item, index in explore_groups.groups_of(at.clusterings, row)]
    memberships += [("group", item, index) for item, index in explore_groups.groups_of(at.duplicates, row)]
    similar, note = _similar_to_row(at, row)
    return render(
        at,
        "explore_picture.html",
        f"Picture {row}",
        row=row,
        name=redact(str(details.get("uri", f"row {row}"))),
        labels=[(item["label"] or str(item["index"]), item["score"]) for item in labels],
        facts=[(name, value) for name, value in details.items() if value is not None],
        memberships=[(kind, item.name, int(item.ids[index])) for kind, item, index in memberships],
        similar=similar,
        note=note,
    )


def _row(at: Exploration, query: Query) -> int:
    row = whole_number(query, "row")
    if not at.has(row):
        raise NotThere(f"Row {row} is no image of this run: it failed, is pending, was replaced or never existed.")
    return row


def _similar_to_row(at: Exploration, row: int) -> tuple[list[Tile], str]:
    if at.searcher is None:
        return [], "This run holds no features, so pictures cannot be compared."
    try:
        vector = at.searcher.vector_of(row)
    except LookupError:
        return [], "This picture came after the vectors were read; start explore again to see what is like it."
    if vector is None:
        return [], "The features of this picture are zero or not finite, so nothing is like it."
    with at.searching:
        rows, scores = at.searcher.nearest(vector, PICTURES_A_PAGE + 1)
    others = rows != row
    values = [f"{score:.3f}" for score in scores[others][:PICTURES_A_PAGE]]
    return make_tiles(at, rows[others][:PICTURES_A_PAGE], values), f"Cosine of {at.searcher.feature}, exact search."


def found(at: Exploration, query: Query) -> Response:
    """What is like a picture that was uploaded."""
    vector = at.uploads.get(query.get("id", ""))
    if vector is None or at.searcher is None:
        raise NotThere("This search is no longer kept; upload the picture again.")
    with at.searching:
        nearest = at.searcher.nearest(vector, _NEIGHBOURS)
    return _hits(at, query, "/found", "Like your picture", at.searcher.feature, nearest)


def found_by_text(at: Exploration, query: Query) -> Response:
    """What is like some words."""
    texts = at.searcher.texts if at.searcher else None
    if texts is None:
        raise NotThere("Pictures of this run cannot be found by words: its model has no text tower, or no `pooled`.")
    words = query.get("words", "").strip()
    if not words:
        return message(at, "No words", "Say in words what to look for, then search.", 400)
    try:
        with at.searching:
            vector = texts.embed(words)
        texts.read()  # other searches need not wait for it
        with at.searching:
            nearest = texts.nearest(vector, _NEIGHBOURS)
    except PatchstreamError as error:
        return message(at, "No search by text", str(error), 500)
    held = at.scan.holds(nearest[0])  # a compaction may have brought rows that came later
    return _hits(at, query, "/words", f"Like “{words}”", texts.feature, (nearest[0][held], nearest[1][held]))


def _hits(at: Exploration, query: Query, path: str, title: str, feature: str, nearest: tuple[Ints, Floats]) -> Response:
    rows, scores = nearest
    pager, window = paginate(len(rows), PICTURES_A_PAGE, query, path)
    tiles = make_tiles(at, rows[window], [f"{score:.3f}" for score in scores[window]])
    return render(at, "explore_found.html", title, tiles=tiles, pager=pager, feature=feature)


def failures(at: Exploration, query: Query) -> Response:
    """Every failure, in pages."""
    page = max(1, whole_number(query, "page", 1))
    _, total = failures_between(at.run, at.scan.replaced, 0, 0)
    pager, window = paginate(total, PICTURES_A_PAGE, {**query, "page": str(page)}, "/failures")
    records, _ = failures_between(at.run, at.scan.replaced, window.start, window.stop)
    return render(at, "explore_failures.html", "Failures", here="/failures", records=records, pager=pager)


def thumbnail(at: Exploration, query: Query) -> Response:
    """One picture as an image, small or large."""
    row = _row(at, query)
    content_type, data = at.thumbnails.get(row, LARGE_SIDE if query.get("size") == "large" else SMALL_SIDE)
    return Response(data, content_type)


def style(at: Exploration, query: Query) -> Response:
    """The style sheet."""
    return Response(asset("base.css", "explore.css").encode(), "text/css; charset=utf-8")


def no_icon(at: Exploration, query: Query) -> Response:
    """Browsers ask for an icon unbidden; there is none."""
    return Response(b"", status=204)


PAGES: dict[str, Callable[[Exploration, Query], Response]] = {
    "/": pictures,
    "/picture": picture,
    "/found": found,
    "/words": found_by_text,
    "/clusters": explore_groups.clusters,
    "/cluster": explore_groups.cluster,
    "/duplicates": explore_groups.duplicates,
    "/group": explore_groups.group,
    "/failures": failures,
    "/thumbnail": thumbnail,
    "/style.css": style,
    "/favicon.ico": no_icon,
}
