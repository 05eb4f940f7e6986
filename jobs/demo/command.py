"""`demo`: the main job on pictures drawn on the spot, with the small model that ships beside this file."""

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.options import Verbose
from jobs.output import emit
from schemas.errors import PatchstreamError

_MODEL = Path(__file__).parent / "model"
_SEED = 2026
# Of pictures, each in a cluster of its own in the end.
_KINDS = 25


def demo(
    out: Annotated[str, typer.Option(help="Folder for the pictures and the dataset.")] = "demo-output",
    pictures: Annotated[int, typer.Option(min=_KINDS, help="How many pictures to draw.")] = 240,
    verbose: Verbose = False,
) -> int:
    """Draw pictures, break a few, embed, label and cluster them: the whole job in a minute, without a network."""
    from jobs.run import run_job
    from pipeline.report import write_report
    from pipeline.store_errors import write_error

    folder = Path(out).expanduser()
    images = folder / "pictures"
    dataset = str(folder / "dataset")
    if not images.exists():
        try:
            _draw(images, pictures)
        except OSError as error:
            raise write_error(str(folder), error) from error
    emit("the model is a toy, trained on such pictures only; it knows nothing about photographs")
    values = {"sources": [str(images)], "model": str(_MODEL), "out": dataset, "labels": 3}
    code = run_job(values, address=None, report=False, json_output=False, verbose=verbose)
    _group(dataset)
    emit(f"look at {write_report(dataset)}\nlook around with: patchstream explore {dataset}")
    return code


def _draw(images: Path, pictures: int) -> None:
    """Drawn elsewhere and moved in whole, so that an interrupted demo does not go on with half of them."""
    from jobs.demo.draw import CLASSES, write_broken, write_pictures

    staging = images.with_name(".pictures")
    shutil.rmtree(staging, ignore_errors=True)
    drawn = write_pictures(staging, pictures, seed=_SEED)
    broken = write_broken(staging)
    staging.rename(images)
    emit(f"drew {drawn} pictures of {len(CLASSES)} kinds and {broken} broken files into {images}")


def _group(dataset: str) -> None:
    """What one would type next, so that the report has clusters and groups to show; their own tables stay away."""
    from jobs.cli import run_command

    for arguments in (["kmeans", dataset, "-k", str(_KINDS), "--name", "kinds"], ["duplicates", dataset]):
        emit(f"patchstream {' '.join(arguments)}")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as problems:
            code = run_command(arguments)
        if code:
            raise PatchstreamError(problems.getvalue())


COMMANDS: dict[str, Callable[..., Any]] = {"demo": demo}
