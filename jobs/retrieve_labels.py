"""`probe`, `apply` and `sql`: new labels from old features, and questions to all tables."""

import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import AsJson, Directory, Options, parse_options
from jobs.output import emit, with_options
from jobs.retrieve_screen import Features, cell, feature_of, opened, print_json, print_table, warn_left_out
from schemas.errors import SpecError

if TYPE_CHECKING:
    from pipeline.retrieval.labels import RowLabels
    from pipeline.retrieval.store import FeatureStore

_NAMED = 10


def probe(
    directory: Directory,
    label_column: Annotated[str | None, typer.Option(help="Column of images/ with the labels.", metavar="C")] = None,
    labels: Annotated[
        str | None, typer.Option(help="CSV with `label` and one of `row`, `uri`, `name`.", metavar="F.csv")
    ] = None,
    split_column: Annotated[
        str | None,
        typer.Option(help="Column of images/ that marks what to test on: test, val, valid, validation.", metavar="C"),
    ] = None,
    shots: Annotated[str | None, typer.Option(help="Also with so few examples a class.", metavar="1,5,10")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Random choices of the few examples.")] = 5,
    name: Annotated[str, typer.Option(help="The name under DIR/probes/.")] = "main",
    features: Features = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other splits.")] = 0,
    storage_options: Options = None,
    as_json: AsJson = False,
) -> int:
    """Train a linear classifier on the features, judge it on held-out rows, and save it."""
    from pipeline.addresses import join
    from pipeline.retrieval.labels import column_text, labels_from_column, labels_from_csv
    from pipeline.retrieval.output import check_name

    check_name(name)
    if (label_column is None) == (labels is None):
        raise SpecError("give either --label-column C or --labels F.csv")
    few = _shots(shots)
    with opened(directory, storage_options) as store:
        feature = feature_of(store, features)
        if split_column is not None:
            column_text(store, split_column, "--split-column")
        if label_column is not None:
            given = labels_from_column(store, label_column)
        else:
            given = labels_from_csv(store, str(labels), parse_options(storage_options))
        _warn_unknown(given)
        warn_left_out(store, feature)
        options = {"few": few, "seeds": seeds, "seed": seed}
        summary = _train(store, feature, given, split_column, name, options)
    if as_json:
        print_json(summary)
        return 0
    _show_probe(summary)
    command = f"patchstream apply {shlex.quote(directory)} --probe {name} --out DIR2"
    saved = join(directory, "probes", name)
    emit(f"\nsaved in {saved}/; next: {with_options(command, parse_options(storage_options))}")
    return 0


def _train(
    store: "FeatureStore",
    feature: str,
    given: "RowLabels",
    split_column: str | None,
    name: str,
    options: dict[str, Any],
) -> dict[str, Any]:
    from pipeline.retrieval.duplicates import same_bytes
    from pipeline.retrieval.labels import locate
    from pipeline.retrieval.probe import describe, run_probe, save_probe
    from pipeline.retrieval.sides import split_by_column

    matrix = store.load(feature)
    found = locate(matrix, given, store.reread(lambda: same_bytes(store)))
    sides = None if split_column is None else split_by_column(store, matrix, found, split_column)
    result = run_probe(matrix, found, sides=sides, progress=store.progress, **options)
    split = None if sides is None else {"column": split_column, "test": sides.marks, "left_out": sides.left_out}
    settings = {"name": name, "feature": feature, "labels_from": given.source, "split": split, "seed": options["seed"]}
    summary = {**settings, **describe(result, found)}
    save_probe(store, result, found, summary)
    return summary


def _shots(text: str | None) -> tuple[int, ...]:
    try:
        few = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        few = (0,)
    if any(count < 1 for count in few):
        raise SpecError(f"--shots {text}: expected numbers of examples, such as 1,5,10")
    return few


def _warn_unknown(given: "RowLabels") -> None:
    if given.unknown:
        more = ["…"] if len(given.unknown) > _NAMED else []
        shown = ", ".join([*(cell(name) for name in given.unknown[:_NAMED]), *more])
        emit(
            f"warning: {len(given.unknown):,} of the {given.named:,} names in {given.source} are of no row in images/ "
            f"and are left out: {shown}",
            to_stderr=True,
        )


def _show_probe(summary: dict[str, Any]) -> None:
    linear, knn = summary["linear"], summary["knn"]
    rows: list[list[Any]] = [
        ["linear", f"{linear['accuracy']:.2%}", f"{linear['mean_class_accuracy']:.2%}",
         f"{linear['expected_calibration_error']:.3f}", f"C = {summary['C']:g}"],
        ["k-NN", f"{knn['accuracy']:.2%}", f"{knn['mean_class_accuracy']:.2%}",
         f"{knn['expected_calibration_error']:.3f}", f"k = {knn['k']}, of {knn['examples']:,} test rows"],
    ]  # fmt: skip
    rows += [
        [f"{count}-shot", f"{found['mean']:.2%} ± {found['std']:.2%}", "", "", ""]
        for count, found in summary["few_shot"].items()
    ]
    rows.append(["most frequent class", f"{summary['majority_accuracy']:.2%}", "", "", ""])
    print_table(["classifier", "accuracy", "mean of classes", "calibration error", ""], rows)
    worst = sorted(linear["classes"].items(), key=lambda item: item[1]["accuracy"])[:10]
    marked = ""
    if split := summary["split"]:
        marks = ", ".join(f"{count:,} {mark}" for mark, count in split["test"].items())
        marked = f" by the column {split['column']} ({marks})"
    emit(f"\n{linear['examples']:,} test rows{marked}, {summary['classes']:,} classes; those of the lowest accuracy:")
    print_table(["class", "accuracy", "examples"],
                [[label, f"{item['accuracy']:.1%}", item["examples"]] for label, item in worst])  # fmt: skip
    if split and split["left_out"]:
        emit(f"\n{split['left_out']:,} rows to learn from are left out: they have the bytes of a test row")


def apply(
    directory: Directory,
    probe: Annotated[str, typer.Option(help="The probe's name.", metavar="NAME")],
    out: Annotated[str, typer.Option(help="A new directory.", metavar="DIR2")],
    top_k: Annotated[int, typer.Option(help="Labels for each row, best first.")] = 1,
    storage_options: Options = None,
    as_json: AsJson = False,
) -> int:
    """Label every row with a trained head, without touching an image."""
    from pipeline.addresses import join
    from pipeline.retrieval.apply import apply_head

    with opened(directory, storage_options) as store:
        summary = apply_head(store, probe, out, top_k=top_k, storage_options=parse_options(storage_options))
    if as_json:
        print_json(summary)
        return 0
    emit(f"{summary['rows']:,} rows with the best {top_k} of {summary['labels']} labels in {join(out, '')}")
    if summary["unlabelled"]["count"]:
        rows = ", ".join(str(row) for row in summary["unlabelled"]["rows"])
        emit(
            f"warning: {summary['unlabelled']['count']:,} rows have no usable vector and no labels: {rows}",
            to_stderr=True,
        )
    return 0


def sql(
    directory: Directory,
    query: Annotated[str, typer.Argument(help="One query in DuckDB's SQL.", metavar="QUERY")],
    out: Annotated[str | None, typer.Option(help="Write .parquet or .csv instead of printing.", metavar="F")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows to print.")] = 100,
    storage_options: Options = None,
    as_json: AsJson = False,
) -> int:
    """Query images, manifest, failures, clusters_NAME, duplicates_NAME, with cosine(a, b) and nearest(row, k)."""
    from pipeline.retrieval import sql as queries

    with opened(directory, storage_options, all_failed=True) as store:
        if out is not None:
            rows = queries.write(store, query, out, parse_options(storage_options))
            if as_json:
                print_json({"out": out, "rows": rows})
            else:
                emit(f"{rows:,} rows in {out}")
            return 0
        answer = queries.ask(store, query, limit)
    if as_json:
        print_json(answer.table.to_pylist())
    elif answer.table.column_names:
        print_table(
            answer.table.column_names, [list(item) for item in zip(*answer.table.to_pydict().values(), strict=True)]
        )
    if answer.more:
        emit(f"only the first {limit:,} rows are shown; --limit shows more, --out writes all", to_stderr=True)
    return 0


COMMANDS: dict[str, Callable[..., Any]] = {"probe": probe, "apply": apply, "sql": sql}
