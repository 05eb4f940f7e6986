"""`report.html`: one file that fetches nothing from anywhere and shows a run at a glance."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.addresses import join
from pipeline.report.charts import counter_bars, most_frequent, score_bars, side_bars, stage_times
from pipeline.report.groups import Grouping, load_clusterings, load_duplicates
from pipeline.report.projection import project, sample_features
from pipeline.report.run import RunDirectory, open_run
from pipeline.report.scan import ABSENT, ImageScan, scan_failures, scan_images
from pipeline.report.summary import facts, progress, tiles
from pipeline.report.text import asset, environment, hash_source, thousands
from pipeline.report.thumbnails import Thumbnailer, addresses
from pipeline.report.view import Pictures, Plot, cluster_sheets, duplicate_sheets, map_view
from pipeline.storage import put_bytes, redact

_MAP_POINTS = 800
_THUMBNAIL_SIDE = 112
_THUMBNAIL_TIMEOUT_S = 60.0
_LABEL_BARS, _FORMAT_BARS = 24, 10
_SHOWN_GROUPINGS = 3
_CLUSTERS, _CLUSTER_PICTURES = 48, 288
_DUPLICATE_GROUPS, _GROUP_PICTURES = 24, 8


def write_report(
    out: str, *, storage_options: Mapping[str, Any] | None = None, thumbnails: int = 96, seed: int = 0
) -> str:
    """Write `report.html` into the run at `out`, and return its address.

    `thumbnails` is how many pictures the gallery shows; which ones, and the points of the map, are drawn at random
    from `seed`. Raises OutputError if `out` is no run, holds damaged parts or cannot be written.
    """
    run = open_run(out, storage_options or {})
    put_bytes(run.fs, join(run.root, "report.html"), render_report(run, thumbnails, seed).encode())
    return join(out, "report.html")


def render_report(run: RunDirectory, thumbnails: int, seed: int) -> str:
    """The page as HTML."""
    scan = scan_images(run)
    plan = _choose(run, scan, thumbnails, seed)
    thumbnailer = Thumbnailer(run)
    try:
        rows = plan.rows()
        records = thumbnailer.records(rows)
        fetched = thumbnailer.thumbnails(rows, _THUMBNAIL_SIDE, _THUMBNAIL_TIMEOUT_S, records)
        pictures = Pictures(scan, addresses(records), fetched)
    finally:
        thumbnailer.close()
    causes = scan_failures(run, scan.replaced)
    failures = sum(cause.count for cause in causes)
    style, script = asset("base.css", "report.css"), asset("map.js")
    return (
        environment()
        .get_template("report.html")
        .render(
            title=f"{run.attempts[0].command if run.attempts else 'embed'} with {redact(run.record.model.name)}",
            subtitle=redact(run.url),
            policy=_policy(style, script),
            css=Markup(style),
            script=Markup(script),
            tiles=tiles(run, scan, failures),
            progress=progress(run, scan, failures),
            facts=facts(run, run.features()),
            causes=causes,
            stages=stage_times(run.attempts),
            attempts=run.attempts,
            footer=f"Written by patchstream on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
            **_sections(plan, scan, pictures),
        )
    )


def _policy(style: str, script: str) -> str:
    """A content security policy: pictures inside the page, this style, this script, and nothing else."""
    inline = f"style-src {hash_source(style)}; script-src {hash_source(script)}"
    return f"default-src 'none'; img-src data:; {inline}; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Shown:
    """The groups of a clustering or of a search for duplicates that fit on the page, and pictures of each."""

    grouping: Grouping
    chosen: tuple[int, ...]
    each: int

    def rows(self) -> set[int]:
        """Every row that is shown."""
        firsts = (self.grouping.rows[self.grouping.members(index)][: self.each] for index in self.chosen)
        return {row for rows in firsts for row in rows.tolist()}


@dataclass(frozen=True)
class Plan:
    """What the page is going to show, before any picture is read."""

    gallery: list[int]
    map: Plot | None
    clusterings: list[Shown]
    duplicates: list[Shown]

    def pictured(self) -> list[int]:
        """Every row that is shown as a picture of its own, the gallery first."""
        grouped = sorted(set().union(*(item.rows() for item in [*self.clusterings, *self.duplicates])))
        return list(dict.fromkeys([*self.gallery, *grouped]))

    def rows(self) -> list[int]:
        """Every row whose thumbnail is wanted: the pictured first, then the points of the map."""
        return list(dict.fromkeys([*self.pictured(), *(self.map.found.rows.tolist() if self.map else [])]))


def _choose(run: RunDirectory, scan: ImageScan, thumbnails: int, seed: int) -> Plan:
    rows = scan.rows
    drawn = np.random.default_rng(seed).choice(rows, min(thumbnails, len(rows)), replace=False)
    clusterings = [_shown_clusters(item) for item in islice(load_clusterings(run, scan), _SHOWN_GROUPINGS)]
    duplicates = [
        Shown(item, tuple(range(min(len(item), _DUPLICATE_GROUPS))), _GROUP_PICTURES)
        for item in islice(load_duplicates(run, scan), _SHOWN_GROUPINGS)
    ]
    return Plan(sorted(drawn.tolist()), _plot(run, scan, seed), clusterings, duplicates)


def _plot(run: RunDirectory, scan: ImageScan, seed: int) -> Plot | None:
    feature = next(iter(run.features()), "")
    if not feature:
        return None
    sample = sample_features(run, feature, scan, _MAP_POINTS, seed)
    found = project(sample.rows, sample.features, seed)
    return Plot(found, feature, sample.read, sample.groups) if len(found.rows) else None


def _shown_clusters(grouping: Grouping) -> Shown:
    """The largest clusters where there are too many, in the order of their numbers."""
    largest = np.argsort(-grouping.sizes, kind="stable")[:_CLUSTERS]
    each = min(12, max(6, _CLUSTER_PICTURES // max(1, len(largest))))
    return Shown(grouping, tuple(np.sort(largest).tolist()), each)


def _sections(plan: Plan, scan: ImageScan, pictures: Pictures) -> dict[str, Any]:
    labelled = bool(scan.names)
    clusterings = [
        {
            "name": item.grouping.name,
            "note": _cluster_note(item),
            "outdated": item.grouping.outdated,
            "sheets": cluster_sheets(item.grouping, item.chosen, item.each, scan, pictures),
        }
        for item in plan.clusterings
    ]
    duplicates = [
        {
            "name": item.grouping.name,
            "note": _duplicate_note(item),
            "outdated": item.grouping.outdated,
            "sheets": duplicate_sheets(item.grouping, item.chosen, item.each, pictures),
        }
        for item in plan.duplicates
    ]
    return {
        "labelled": labelled,
        "pictures": [pictures(row) for row in plan.gallery],
        "pictures_note": f"{thousands(len(plan.gallery))} of {thousands(len(scan.rows))}, drawn at random.",
        "histograms": _histograms(scan),
        "map": map_view(plan.map, scan, pictures, set(plan.pictured())) if plan.map else None,
        "clusterings": clusterings,
        "duplicates": duplicates,
        "contents": _contents(plan, labelled),
    }


def _contents(plan: Plan, labelled: bool) -> list[tuple[str, str]]:
    entries = [
        ("pictures", "Pictures and labels" if labelled else "Pictures", True),
        ("failures", "Failures", True),
        ("distributions", "Distributions", True),
        ("map", "Map", plan.map is not None),
        ("clusters", "Clusters", bool(plan.clusterings)),
        ("duplicates", "Near-duplicates", bool(plan.duplicates)),
        ("timings", "Timings", True),
    ]
    return [(anchor, name) for anchor, name, there in entries if there]


def _histograms(scan: ImageScan) -> list[tuple[str, Any]]:
    charts = [
        ("First label", most_frequent(scan.label_counts(), _LABEL_BARS, "more labels")),
        ("Score of the first label", score_bars(scan.scores[scan.codes != ABSENT])),
        ("Longer side", side_bars(scan.sides)),
        ("Shape", counter_bars(scan.shapes, 3)),
        ("Format", counter_bars(scan.formats, _FORMAT_BARS)),
    ]
    return [(name, rows) for name, rows in charts if rows]


def _cluster_note(item: Shown) -> str:
    whole = len(item.grouping)
    which = "" if len(item.chosen) == whole else f", the {len(item.chosen)} largest are shown"
    return (
        f"{thousands(whole)} clusters of {thousands(len(item.grouping.rows))} pictures{which}; "
        "in each, those nearest to its centre."
    )


def _duplicate_note(item: Shown) -> str:
    whole, pictures = len(item.grouping), len(item.grouping.rows)
    extra = pictures - int(np.count_nonzero(item.grouping.keep))
    which = "" if len(item.chosen) == whole else f", the {len(item.chosen)} largest are shown"
    return (
        f"{thousands(whole)} groups of {thousands(pictures)} pictures, {thousands(extra)} of them could go{which}. "
        "The picture to keep comes first; the number under the others is their similarity."
    )
