"""What the page shows, ready for the template: pictures, sheets, the marks of the map."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.groups import Grouping, common_labels
from pipeline.report.projection import FeatureMap
from pipeline.report.scan import ImageScan
from pipeline.report.text import percent, short_name, thousands
from pipeline.report.thumbnails import Thumbnail

WIDTH, HEIGHT, _MARGIN = 900, 560, 16
_COLOURS = 10
_SHAPES = (
    "M-4.6 0a4.6 4.6 0 1 0 9.2 0a4.6 4.6 0 1 0-9.2 0Z",
    "M-4.1-4.1h8.2v8.2h-8.2Z",
    "M0-5.4L5.2 4H-5.2Z",
)
_OTHER_SHAPE = "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0Z"


@dataclass(frozen=True)
class Picture:
    """One picture on a page. `source` is a `data:` address, None where `reason` says why there is none."""

    row: int
    name: str
    label: str | None
    score: float | None
    source: str | None
    reason: str
    kept: bool = False
    value: float = 0.0

    @property
    def alt(self) -> str:
        """What a screen reader says."""
        return f"{self.label} ({self.name})" if self.label is not None else self.name


@dataclass(frozen=True)
class Sheet:
    """One cluster or one group of near-duplicates."""

    name: str
    size: int
    note: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Plot:
    """A map of a feature, whose points were drawn from `read` of the `groups` row groups there are."""

    found: FeatureMap
    feature: str
    read: int
    groups: int


class Pictures:
    """Makes a Picture of a row from what was scanned and fetched."""

    def __init__(self, scan: ImageScan, uris: Mapping[int, str], thumbnails: Mapping[int, Thumbnail]) -> None:
        self._scan = scan
        self._uris = uris
        self._thumbnails = thumbnails

    def __call__(self, row: int, *, kept: bool = False, value: float = 0.0) -> Picture:
        """The picture of `row`."""
        thumbnail = self._thumbnails.get(row, Thumbnail(None, "not read"))
        name = short_name(self._uris.get(row, f"row {row}"))
        score = self.score(row)
        return Picture(row, name, self._scan.label(row), score, thumbnail.data_uri, thumbnail.reason, kept, value)

    def score(self, row: int) -> float | None:
        """The score of the first label of `row`."""
        score = float(self._scan.scores[row]) if row < len(self._scan.scores) else float("nan")
        return score if np.isfinite(score) else None


def map_view(plot: Plot, scan: ImageScan, pictures: Pictures, on_page: Set[int]) -> dict[str, Any]:
    """Marks, legend and tooltip data of the scatter plot. The most frequent labels, of two pictures or more,
    get a colour and a shape.

    Thumbnails of the rows `on_page` are taken from there, so that no picture is in the file twice for the map.
    """
    found = plot.found
    codes = scan.codes[found.rows]
    series_of, legend = _series(scan, codes)
    marks, points, thumbnails = [], [], {}
    for row, code, (x, y) in zip(found.rows.tolist(), codes.tolist(), found.points.tolist(), strict=True):
        picture = pictures(row)
        entry = legend[series_of[code]]
        across = _MARGIN + x * (WIDTH - 2 * _MARGIN)
        down = _MARGIN + y * (HEIGHT - 2 * _MARGIN)
        marks.append({"x": across, "y": down, "colour": entry["colour"], "shape": entry["shape"]})
        points.append(
            {
                "row": row,
                "label": picture.label,
                "score": picture.score,
                "name": picture.name,
                "series": entry["index"],
            }
        )
        if picture.source and row not in on_page:
            thumbnails[row] = picture.source
    note = f"{thousands(len(marks))} of {thousands(len(scan.rows))} pictures by {plot.feature}: {found.method}."
    if plot.read < plot.groups:
        note += f" They are from {thousands(plot.read)} of {thousands(plot.groups)} row groups, drawn at random."
    if found.left_out:
        note += f" {thousands(found.left_out)} with zero or non-finite features are left out."
    data = {"points": points, "thumbnails": thumbnails}
    return {"width": WIDTH, "height": HEIGHT, "marks": marks, "legend": legend, "data": data, "note": note}


def _series(scan: ImageScan, codes: NDArray[np.int32]) -> tuple[dict[int, int], list[dict[str, Any]]]:
    """Which legend entry a label code belongs to, and the entries: one a label, the rest together."""
    values, counts = np.unique(codes, return_counts=True)
    order = [index for index in np.argsort(-counts, kind="stable") if values[index] >= 0 and counts[index] > 1]
    named = order[: _COLOURS * len(_SHAPES)]
    legend = [
        {
            "index": position,
            "name": scan.names[values[index]],
            "count": int(counts[index]),
            "colour": str(position % _COLOURS),
            "shape": _SHAPES[position // _COLOURS],
        }
        for position, index in enumerate(named)
    ]
    series_of = {int(values[index]): position for position, index in enumerate(named)}
    rest = [int(value) for value in values if int(value) not in series_of]
    if rest:
        count = int(sum(counts[values == value].sum() for value in rest))
        name = f"{len(rest)} other labels" if legend else "all pictures"
        legend.append({"index": len(legend), "name": name, "count": count, "colour": "x", "shape": _OTHER_SHAPE})
        series_of |= dict.fromkeys(rest, len(legend) - 1)
    return series_of, legend


def cluster_sheets(
    grouping: Grouping, chosen: Sequence[int], each: int, scan: ImageScan, pictures: Pictures
) -> list[Sheet]:
    """Contact sheets of the clusters `chosen`: the pictures nearest to the centre, and the most frequent labels."""
    sheets = []
    for index in chosen:
        rows = grouping.rows[grouping.members(index)]
        labels = " · ".join(f"{name} {percent(share)}" for name, share in common_labels(scan, rows, 3))
        sheets.append(
            Sheet(f"Cluster {grouping.ids[index]}", len(rows), labels, [pictures(int(row)) for row in rows[:each]])
        )
    return sheets


def duplicate_sheets(grouping: Grouping, chosen: Sequence[int], each: int, pictures: Pictures) -> list[Sheet]:
    """Groups of near-duplicates: the picture that is kept, then the others by similarity."""
    sheets = []
    for index in chosen:
        where = grouping.members(index)
        first = slice(where.start, min(where.stop, where.start + each))
        members = zip(grouping.rows[first], grouping.keep[first], grouping.values[first], strict=True)
        shown = [pictures(int(row), kept=bool(kept), value=float(value)) for row, kept, value in members]
        sheets.append(Sheet(f"Group {grouping.ids[index]}", where.stop - where.start, "", shown))
    return sheets
