"""What the retrieval commands share: opening a run with progress on standard error, and tables on standard output."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import parse_options
from jobs.output import emit

if TYPE_CHECKING:
    from pipeline.retrieval.store import FeatureStore

Features = Annotated[
    str | None,
    typer.Option("--features", help="cls or pooled; the first that the run has if not said.", metavar="NAME"),
]

# `--ray` values that mean a Ray of our own, or the one that RAY_ADDRESS names.
LOCAL_RAY = ("local", "auto")

_NAMED_ROWS = 10


@contextlib.contextmanager
def opened(directory: str, storage_options: str | None, *, all_failed: bool = False) -> "Iterator[FeatureStore]":
    """The store of `directory` (`all_failed` as `FeatureStore.open` has it); while it works, a bar on standard error
    if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from pipeline.retrieval.store import FeatureStore

    store = FeatureStore.open(directory, parse_options(storage_options), all_failed=all_failed)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        store.progress = show
        yield store


def feature_of(store: "FeatureStore", name: str | None) -> str:
    """The feature that `--features` names, or the run's first: `cls` where it holds that. Raises OutputError if it does
    not hold what is named, or none at all."""
    feature = next(iter(store.features), "cls") if name is None else name
    store.check_feature(feature)
    return feature


def warn_left_out(store: "FeatureStore", feature: str) -> None:
    """Say on standard error which rows cannot take part. It reads the whole feature."""
    rows = store.load(feature).left_out
    name_left_out(feature, len(rows), rows[:_NAMED_ROWS].tolist())


def name_left_out(feature: str, count: int, first: Sequence[int]) -> None:
    """Say on standard error that `count` rows cannot take part, and name the first of them."""
    if count:
        named = ", ".join(str(row) for row in first[:_NAMED_ROWS]) + (", …" if count > _NAMED_ROWS else "")
        emit(
            f"warning: {count:,} rows have a zero or non-finite `{feature}` and are left out: {named}",
            to_stderr=True,
        )


def print_json(content: Any) -> None:
    """Strict JSON on standard output: what is not finite becomes null."""
    emit(json.dumps(_plain(content), ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):  # DuckDB's sums of integers, and numbers of a fixed scale
        value = int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, bool)):
        return value
    return value.hex() if isinstance(value, bytes) else str(value)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned columns on standard output; numbers to the right. Control characters are shown, not sent."""
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max([len(name), *(len(row[at]) for row in cells)]) for at, name in enumerate(header)]
    right = [bool(rows) and all(isinstance(row[at], (int, float)) for row in rows) for at in range(len(header))]
    for line in [list(header), *cells]:
        fitted = (
            text.rjust(width) if numeric else text.ljust(width)
            for text, width, numeric in zip(line, widths, right, strict=True)
        )
        emit("  ".join(fitted).rstrip())


def cell(value: Any) -> str:
    """One value as text on one line, long lists cut short."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and len(value) > 4:
        return f"[{', '.join(cell(item) for item in value[:3])}, … {len(value)}]"
    text = value if isinstance(value, str) else str(value)
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def thumbnails(
    directory: str, storage_options: str | None, rows: Sequence[int], side: int = 160
) -> dict[int, str | None]:
    """`data:` addresses of small pictures, read through the manifest; None for one that cannot be read."""
    from pipeline.report.run import open_run
    from pipeline.report.thumbnails import Thumbnailer

    maker = Thumbnailer(open_run(directory, parse_options(storage_options)))
    try:
        return {row: found.data_uri for row, found in maker.thumbnails(rows, side).items()}
    finally:
        maker.close()


def write_page(path: str, page: str, storage_options: str | None = None) -> None:
    """Write an HTML page, which appears whole or not at all. Raises OutputError naming the path if that fails."""
    from pipeline.retrieval.output import staged
    from pipeline.storage import filesystem

    with staged(*filesystem(path, parse_options(storage_options))) as local:
        local.write_text(page, encoding="utf-8")
    sys.stderr.write(f"wrote {path}\n")
