"""The head of the page: how much is done, how fast it went, with which model and versions."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline.progress import duration
from pipeline.report.run import RunDirectory
from pipeline.report.scan import ImageScan
from pipeline.report.text import percent, rate, thousands
from pipeline.storage import redact
from schemas.attempt import AttemptRecord
from schemas.run import ModelRecord


@dataclass(frozen=True)
class Tile:
    """One figure, its name, and what it means."""

    name: str
    value: str
    note: str = ""


def tiles(run: RunDirectory, scan: ImageScan, failures: int) -> list[Tile]:
    """Rows, images, failures, speed and time. Speed is images over wall time, of the attempts that ended.

    Wall time that several of them shared, as shards side by side do, counts once.
    """
    rows = _asked(run, scan)
    ended = [item for item in run.attempts if item.wall_s]
    wall_s = _wall_s(ended)
    images = sum(item.images for item in ended)
    shares = [percent(count / rows) if rows else "" for count in (scan.images, failures)]
    without = f"without {thousands(len(scan.replaced))} replaced by newer versions" if len(scan.replaced) else ""
    attempts = f"{len(run.attempts)} attempt{'' if len(run.attempts) == 1 else 's'}"
    return [
        Tile("Rows asked for", thousands(rows), without),
        Tile("Images", thousands(scan.images), shares[0]),
        Tile("Failures", thousands(failures), shares[1]),
        Tile("Images per second", rate(images / wall_s if wall_s else None), "with start-up" if wall_s else ""),
        Tile("Wall time", duration(wall_s or None), attempts),
    ]


def _wall_s(ended: Sequence[AttemptRecord]) -> float:
    """Seconds in which one of these attempts at least was under way."""
    starts = [datetime.fromisoformat(item.started).timestamp() for item in ended]
    total, reached = 0.0, 0.0
    for start, item in sorted(zip(starts, ended, strict=True), key=lambda pair: pair[0]):
        stop = start + (item.wall_s or 0.0)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def _asked(run: RunDirectory, scan: ImageScan) -> int:
    """Rows of the manifest that no newer ones replace."""
    return run.record.manifest_rows - len(scan.replaced)


def progress(run: RunDirectory, scan: ImageScan, failures: int) -> dict[str, Any]:
    """Images and failures in percent of the rows that no newer ones replace, and the sentence that says so."""
    images, rows = scan.images, _asked(run, scan)
    pending = max(0, rows - images - failures)
    text = f"{thousands(images)} images, {thousands(failures)} failures, {thousands(pending)} pending."
    whole = max(rows, images + failures, 1)
    if pending:
        text += " The run is not complete; the same command goes on from here."
    return {"images": 100 * images / whole, "failures": 100 * failures / whole, "text": text}


def facts(run: RunDirectory, features: dict[str, int]) -> list[tuple[str, str]]:
    """Names and values under the figures."""
    record = run.record
    model = record.model
    columns = ", ".join(f"{name} ({dim})" for name, dim in features.items()) or "none"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()))
    sources = record.spec.get("sources") or ()
    return [
        ("Sources", ", ".join(redact(str(source)) for source in sources)),
        ("Model", _model(model)),
        ("Weights digest", model.digest),
        ("Computed in", model.dtype),
        ("Preprocessing", _preprocessing(model)),
        ("Features", columns),
        ("Pooled is", model.pooled),
        ("Versions", versions),
        ("Run", f"{record.run_id}, created {record.created[:19].replace('T', ' ')}"),
    ]


def _model(model: ModelRecord) -> str:
    revision = f" at {model.revision}" if model.revision else ""
    classes = f", {thousands(model.num_labels)} labels" if model.num_labels else ""
    kind = " (multi-label)" if model.multi_label else ""
    return f"{redact(model.name)}{revision}: {model.architecture}, {model.hidden_size} wide{classes}{kind}"


def _preprocessing(model: ModelRecord) -> str:
    wanted = model.preprocessing
    steps = []
    if wanted.resize:
        steps.append(f"resized to {wanted.resize[0]}×{wanted.resize[1]}")
    if wanted.shortest_edge:
        steps.append(f"shortest edge to {wanted.shortest_edge}")
    if wanted.cover:
        steps.append(f"resized to cover {wanted.cover[0]}×{wanted.cover[1]}")
    if wanted.crop:
        steps.append(f"centre crop {wanted.crop[0]}×{wanted.crop[1]}")
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (wanted.mean, wanted.std))
    return "; ".join([*steps, f"mean {mean}", f"standard deviation {std}"])
