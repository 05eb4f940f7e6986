"""Pages of `explore` for clusters and for groups of near-duplicates: the list of them, and one of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.report.explore_render import (
    PICTURES_A_PAGE,
    NotThere,
    Query,
    Response,
    Tile,
    link,
    make_tiles,
    paginate,
    render,
    whole_number,
)
from pipeline.report.explore_state import Exploration
from pipeline.report.groups import Grouping, common_labels
from pipeline.report.text import percent

_GROUPS_A_PAGE, _PICTURES_A_GROUP = 24, 8


@dataclass(frozen=True)
class GroupCard:
    """One cluster or group in a list of them."""

    id: int
    size: int
    note: str
    tiles: list[Tile]


def clusters(at: Exploration, query: Query) -> Response:
    """The clusters of one clustering."""
    return _group_list(at, query, at.clusterings, "/clusters", "/cluster", "Cluster")


def duplicates(at: Exploration, query: Query) -> Response:
    """Groups of near-duplicates, largest first."""
    return _group_list(at, query, at.duplicates, "/duplicates", "/group", "Group")


def cluster(at: Exploration, query: Query) -> Response:
    """One cluster, nearest to its centre first."""
    return _group(at, query, at.clusterings, "/cluster", "Cluster")


def group(at: Exploration, query: Query) -> Response:
    """One group of near-duplicates, the picture to keep first."""
    return _group(at, query, at.duplicates, "/group", "Group")


def _grouping(query: Query, groupings: Mapping[str, Grouping]) -> Grouping:
    name = query.get("name") or next(iter(groupings), "")
    if name not in groupings:
        raise NotThere(f"There is nothing named {name!r} here; there is: {', '.join(groupings) or 'nothing yet'}.")
    return groupings[name]


def _group_list(
    at: Exploration, query: Query, groupings: Mapping[str, Grouping], path: str, one: str, kind: str
) -> Response:
    chosen = _grouping(query, groupings)
    pager, window = paginate(len(chosen), _GROUPS_A_PAGE, query, path)
    cards = []
    for index in range(len(chosen))[window]:
        where = chosen.members(index)
        labels = common_labels(at.scan, chosen.rows[where], 3)
        first = slice(where.start, min(where.stop, where.start + _PICTURES_A_GROUP))
        tiles = make_tiles(at, chosen.rows[first], _values(chosen, first))
        note = " · ".join(f"{name} {percent(share)}" for name, share in labels)
        cards.append(GroupCard(int(chosen.ids[index]), where.stop - where.start, note, tiles))
    title = f"{kind}s of {chosen.name}"
    names = [(name, link(path, name=name)) for name in groupings]
    return render(
        at,
        "explore_groups.html",
        title,
        here=path,
        cards=cards,
        pager=pager,
        kind=kind,
        one=one,
        chosen=chosen.name,
        names=names,
        outdated=chosen.outdated,
    )


def _group(at: Exploration, query: Query, groupings: Mapping[str, Grouping], path: str, kind: str) -> Response:
    chosen = _grouping(query, groupings)
    number = whole_number(query, "id")
    matching = np.flatnonzero(chosen.ids == number).tolist()
    if not matching:
        raise NotThere(f"{kind} {number} does not exist in {chosen.name}.")
    index = matching[0]
    where = chosen.members(index)
    pager, window = paginate(int(chosen.sizes[index]), PICTURES_A_PAGE, query, path)
    part = slice(where.start + window.start, min(where.stop, where.start + window.stop))
    tiles = make_tiles(at, chosen.rows[part], _values(chosen, part))
    return render(
        at,
        "explore_group.html",
        f"{kind} {number} of {chosen.name}",
        here="/clusters" if groupings is at.clusterings else "/duplicates",
        tiles=tiles,
        pager=pager,
        outdated=chosen.outdated,
        note=" · ".join(f"{name} {percent(share)}" for name, share in common_labels(at.scan, chosen.rows[where], 5)),
    )


def groups_of(groupings: Mapping[str, Grouping], row: int) -> list[tuple[Grouping, int]]:
    """Each grouping that `row` is in, and the index of its group there."""
    found = []
    for grouping in groupings.values():
        for position in np.flatnonzero(grouping.rows == row)[:1]:
            found.append((grouping, int(np.searchsorted(grouping.starts, position, side="right")) - 1))
    return found


def _values(grouping: Grouping, part: slice) -> list[str]:
    pairs = zip(grouping.values[part], grouping.keep[part], strict=True)
    return ["kept" if keep else f"{value:.3f}" for value, keep in pairs]
