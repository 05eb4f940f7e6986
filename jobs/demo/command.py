"""`demo`: the main job on pictures drawn on the spot, with the small model that ships beside this file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

_MODEL = Path(__file__).parent / "model"
_SEED = 2026


def demo(
    out: Annotated[str, typer.Option(help="Folder for the pictures and the dataset.")] = "demo-output",
    pictures: Annotated[int, typer.Option(help="How many pictures to draw.")] = 240,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show tracebacks and Ray's own output.")] = False,
) -> int:
    """Draw pictures, break a few, embed and label them: the whole job in a minute, without a network."""
    from jobs.demo.draw import CLASSES, write_broken, write_pictures
    from jobs.run import run_job

    folder = Path(out)
    images = folder / "pictures"
    if not images.exists():
        staging = folder / ".pictures"
        shutil.rmtree(staging, ignore_errors=True)
        drawn = write_pictures(staging, pictures, seed=_SEED)
        broken = write_broken(staging)
        staging.rename(images)
        typer.echo(f"drew {drawn} pictures of {len(CLASSES)} kinds and {broken} broken files into {images}")
    typer.echo("the model is a toy, trained on such pictures only; it knows nothing about photographs")
    values = {
        "sources": [str(images)],
        "model": str(_MODEL),
        "out": str(folder / "dataset"),
        "labels": 3,
    }
    return run_job(values, address=None, report=True, json_output=False, verbose=verbose)


COMMANDS: dict[str, Callable[..., Any]] = {"demo": demo}
