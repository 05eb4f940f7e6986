"""`kmeans` and `duplicates`: what belongs together."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import AsJson, Directory, Options, options_given
from jobs.output import emit
from jobs.retrieve_screen import (
    LOCAL_RAY,
    Features,
    feature_of,
    name_left_out,
    opened,
    print_json,
    print_table,
    thumbnails,
    warn_left_out,
    write_page,
)
from schemas.errors import SpecError

if TYPE_CHECKING:
    from pipeline.retrieval.store import FeatureStore
    from pipeline.retrieval.thresholds import Band


def kmeans(
    directory: Directory,
    k: Annotated[int | None, typer.Option("-k", min=1, help="How many clusters.")] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Try several k and take the one of the best silhouette.", metavar="LOW:HIGH[:STEP]"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The name under DIR/clusters/; k24 for -k 24 if not said.")] = None,
    features: Features = None,
    spherical: Annotated[
        bool, typer.Option("--spherical/--euclidean", help="Compare directions, or vectors as they are.")
    ] = True,
    centre: Annotated[bool, typer.Option("--centre", help="Take the mean away first.")] = False,
    label_column: Annotated[
        str | None, typer.Option(help="Column that says what clusters hold; labels if not said.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other starts.")] = 0,
    mini_batch: Annotated[
        bool | None, typer.Option(help="Move centres by batches; if not said, where the vectors do not fit in memory.")
    ] = None,
    ray: Annotated[str | None, typer.Option(help="Run over parts on Ray: an address, or `local`.")] = None,
    storage_options: Options = None,
    as_json: AsJson = False,
) -> int:
    """Cluster the vectors, and say what distinguishes each cluster."""
    from pipeline.retrieval.clustering import check_one, cluster
    from pipeline.retrieval.clusters import check_label_column
    from pipeline.retrieval.output import check_name
    from pipeline.retrieval.sweep import parse_sweep

    check_name(name or "k")
    check_one(k, sweep)
    if ray is not None and mini_batch is not None:
        raise SpecError("--ray goes over all rows in each step; leave out --mini-batch and --no-mini-batch")
    ks = parse_sweep(sweep) if sweep is not None else None
    with opened(directory, storage_options) as store:
        check_label_column(store, label_column)
        _check_rows(store, k, ks)
        feature = feature_of(store, features)
        settings: dict[str, Any] = {"feature": feature, "centre": centre, "seed": seed, "label_column": label_column}
        if ray is not None:
            summary = _kmeans_on_ray(store, k, ray, name, spherical, settings)
        else:
            warn_left_out(store, feature)
            summary = cluster(store, k=k, ks=ks, name=name, spherical=spherical, mini_batch=mini_batch, **settings)
    if as_json:
        print_json(summary)
        return 0
    _show_clusters(summary, directory)
    return 0


def _check_rows(store: "FeatureStore", k: int | None, ks: list[int] | None) -> None:
    """Raise SpecError for more clusters than rows. How many of the vectors are usable shows when they are read."""
    if k is not None and k > len(store):
        raise SpecError(f"-k {k}: there are {len(store)} rows; k is between 1 and that")
    if ks and max(ks) >= len(store):
        raise SpecError(f"--sweep up to {max(ks)}: there are {len(store)} rows; stay below that")


def _show_clusters(summary: dict[str, Any], directory: str) -> None:
    from pipeline.addresses import join

    if "sweep" in summary:
        print_table(["k", "inertia", "silhouette"], [list(trial.values()) for trial in summary["sweep"]])
        emit(f"elbow at {summary['elbow']}, best silhouette at {summary['k']}\n")
    rows = [
        [item["cluster"], item["size"], item["medoid"]["row"] if item["medoid"] else "", _labels(item["labels"])]
        for item in summary["clusters"]
    ]
    print_table(["cluster", "size", "medoid", "what distinguishes it (share of the cluster, of all)"], rows)
    emit(f"\n{summary['rows']:,} rows in {join(directory, 'clusters', summary['name'])}/")


def _labels(labels: list[dict[str, Any]]) -> str:
    return ", ".join(f"{item['label']} ({item['share']:.0%}, {item['base']:.1%})" for item in labels[:3])


def _kmeans_on_ray(
    store: "FeatureStore", k: int | None, ray: str, name: str | None, spherical: bool, settings: dict[str, Any]
) -> dict[str, Any]:
    if k is None or settings["centre"]:
        raise SpecError("--ray goes with -k, and without --centre")
    from cluster.session import ray_session
    from pipeline.retrieval.ray_kmeans import kmeans_on_ray

    feature = settings["feature"]
    with ray_session(None if ray in LOCAL_RAY else ray):
        summary = kmeans_on_ray(store, feature, k, name or f"k{k}", spherical=spherical, settings=settings)
    # Counted by the tasks: only they read the vectors.
    name_left_out(feature, summary["left_out"]["count"], summary["left_out"]["rows"])
    return summary


def duplicates(
    context: typer.Context,
    directory: Directory,
    threshold: Annotated[float, typer.Option(help="Cosine from which two pictures are near-duplicates.")] = 0.88,
    name: Annotated[str, typer.Option(help="The name under DIR/duplicates/.")] = "main",
    features: Features = None,
    exact_only: Annotated[bool, typer.Option("--exact-only", help="Only files with the same bytes.")] = False,
    around: Annotated[
        float | None,
        typer.Option(help="Write nothing; show how many pairs lie around this threshold, and some.", metavar="T"),
    ] = None,
    html: Annotated[str | None, typer.Option(help="With --around: write a page with the pairs.", metavar="F")] = None,
    storage_options: Options = None,
    as_json: AsJson = False,
) -> int:
    """Group files with the same bytes and pictures that are nearly the same; say what could be deleted."""
    from pipeline.addresses import join
    from pipeline.retrieval.duplicates import check_threshold, find_duplicates, write_duplicates
    from pipeline.retrieval.output import check_name
    from pipeline.retrieval.thresholds import pairs_around

    check_name(name)
    if html is not None and around is None:
        raise SpecError("--html writes the pairs that --around T shows; give both")
    if around is not None and (others := options_given(context, "threshold", "exact_only", "name")):
        raise SpecError(f"--around T shows pairs that lie around T and writes no table; leave out {others}")
    if exact_only and (others := options_given(context, "threshold", "features")):
        raise SpecError(f"--exact-only compares files, not vectors; leave out {others}")
    check_threshold(threshold)
    if around is not None:
        check_threshold(around, "--around")
    with opened(directory, storage_options) as store:
        if exact_only:
            settings: dict[str, Any] = {"feature": None, "threshold": None}
            found = find_duplicates(store, exact_only=True)
        else:
            feature = feature_of(store, features)
            warn_left_out(store, feature)
            if around is not None:
                bands = pairs_around(store, around, feature=feature)
                return _show_bands(bands, directory, storage_options, html, as_json)
            settings = {"feature": feature, "threshold": threshold}
            found = find_duplicates(store, threshold, feature=feature)
        summary = write_duplicates(store, found, name, {"name": name, **settings})
    if as_json:
        print_json(summary)
        return 0
    emit(f"{summary['groups']:,} groups with {summary['in_groups']:,} of {summary['rows']:,} rows: "
         f"{summary['exact']:,} with the bytes of the one kept, {summary['near']:,} near it")  # fmt: skip
    written = join(directory, "duplicates", name)
    emit(f"{written}/  row, group, keep, score")
    emit(f"{written}.delete.txt  {summary['to_delete']:,} addresses")
    for reason in ("kept_elsewhere", "of_line_breaks"):
        if summary[f"not_listed_because_{reason}"]:
            count = summary[f"not_listed_because_{reason}"]
            emit(
                f"warning: {count:,} addresses are not in the list, because {reason.replace('_', ' ')}", to_stderr=True
            )
    return 0


def _show_bands(
    bands: "list[Band]", directory: str, storage_options: str | None, html: str | None, as_json: bool
) -> int:
    if as_json:
        print_json([vars(band) for band in bands])
    else:
        rows_shown = [
            [f"{band.low:g} to {band.high:g}", band.pairs, "  ".join(f"{a}~{b}" for a, b, _ in band.examples)]
            for band in bands
        ]
        print_table(["cosine", "pairs", "examples (row~row)"], rows_shown)
    if html:  # last, so that a page that cannot be written takes no answer with it
        _write_pairs(html, bands, directory, storage_options)
    return 0


def _write_pairs(path: str, bands: "list[Band]", directory: str, storage_options: str | None) -> None:
    from pipeline.retrieval.page import Picture, pictures_page

    rows = sorted({row for band in bands for pair in band.examples for row in pair[:2]})
    strips = [
        (
            f"{band.low:g} to {band.high:g}: {band.pairs:,} pairs",
            [Picture(row, [f"{score:.4f}", f"row {row}"]) for first, second, score in band.examples
             for row in (first, second)],
        )
        for band in bands
    ]  # fmt: skip
    page = pictures_page("Pairs around the threshold", strips, thumbnails(directory, storage_options, rows))
    write_page(path, page, storage_options)


COMMANDS: dict[str, Callable[..., Any]] = {"kmeans": kmeans, "duplicates": duplicates}
