"""`report`: one page that shows a run at a glance."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from jobs.options import AsJson, Directory, Options, parse_options
from jobs.output import emit


def report(
    directory: Directory,
    pictures: Annotated[int, typer.Option(min=0, max=1000, help="How many pictures the gallery shows.")] = 96,
    seed: Annotated[int, typer.Option(min=0, help="Which pictures are drawn.")] = 0,
    storage_options: Options = None,
    as_json: AsJson = False,
) -> int:
    """Write DIR/report.html: a self-contained page of pictures, failures, labels, clusters and timings."""
    import json

    from pipeline.report import write_report

    path = write_report(directory, storage_options=parse_options(storage_options), thumbnails=pictures, seed=seed)
    emit(json.dumps({"report": path}) if as_json else path)
    return 0


COMMANDS: dict[str, Callable[..., Any]] = {"report": report}
