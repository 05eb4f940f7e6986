"""The whole job on a few seconds' worth of images into a folder that is thrown away: all stages together."""

import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from pipeline.addresses import join
from pipeline.flow import Connect, run
from pipeline.opening import ResolvedJob
from pipeline.placement import Placement
from pipeline.predicting import place_job, placement_of
from pipeline.progress import Progress
from pipeline.storage import Options, filesystem
from schemas.errors import Interrupted
from schemas.machines import Machines
from schemas.spec import JobSpec

_LEAST_IMAGES = 48


class Rehearsal(NamedTuple):
    """Images a second once the workers are warm and while none has run out of work; seconds to the first batch,
    Ray being there."""

    images: int
    images_per_s: float
    startup_s: float


def rows_to_rehearse(resolved: ResolvedJob, machines: Machines, placement: Placement, enough: float) -> tuple[int, int]:
    """Images of a rehearsal, `enough` for its time and four times what a job placed so works on at once; and its tail:
    how many it works on at once itself, for it is placed for its own rows, or has on the way, as far as half of them
    are left to count."""
    images = int(max(_LEAST_IMAGES, 4 * _at_once(placement, machines), enough))
    own = placement_of(resolved, machines, images)
    return images, max(_at_once(own, machines), min(own.stream_rows, images // 4))


def _at_once(placement: Placement, machines: Machines) -> int:
    # Of as many actors as may be, those that there is room for now.
    lanes = placement.initial_actors * placement.actor_lanes
    lanes = lanes if placement.actor_gpus else min(lanes, int(machines.cpus))
    return lanes * placement.block_rows


def place_for_long(resolved: ResolvedJob, machines: Machines, rows: int) -> Placement:
    """Placement of a job of `rows` whose decoders are as far ahead as those of a long one may be for how long it takes:
    no further than every stage has work. What they have done while the models load would else be most of a short one,
    and the cores were free for the rest."""
    placement = place_job(resolved, machines, rows)
    needed = placement.stream_rows * placement.row_bytes
    return placement._replace(stream_bytes=min(placement.stream_bytes, needed))


def rehearse(
    spec: JobSpec, connect: Connect, *, images: int, listed: int, tail: int, scratch: str | None = None
) -> Rehearsal:
    """Run `spec` on `images` images and leave nothing behind. The sources, of which `listed` are known to be there, are
    named so often that they have as many.

    `tail`: rows that all actors work on at once, or that are on their way to them. So many at the beginning and at the
    end are not counted: the first arrive together, having been decoded while the models loaded, and during the last
    some have nothing left to do. `scratch`: a folder or prefix that every node can
    write to, by default a temporary folder of this machine.
    """
    seen: list[tuple[float, int]] = []

    def listen(progress: Progress) -> None:
        if progress.phase == "running" and (not seen or progress.done > seen[-1][1]):
            seen.append((time.monotonic(), progress.done))

    repeats = -(-images // max(1, listed))
    with _folder(scratch, spec.storage_options) as folder:
        values = {"out": join(folder, "out"), "sources": spec.sources * repeats, "limit": images}
        try:
            summary = run(spec.model_copy(update=values), connect, listen, place_for_long)
        except Interrupted as stopped:  # which speaks of a folder that will be gone
            number = stopped.exit_code - 128
            raise Interrupted("interrupted; nothing was kept, the same command begins again", number) from None
    return Rehearsal(summary.rows, steady_rate(seen, tail, summary.rows - tail), summary.attempt.startup_s or 0.0)


@contextmanager
def _folder(scratch: str | None, storage_options: Options) -> Iterator[str]:
    if scratch is None:
        with tempfile.TemporaryDirectory(prefix="patchstream-rehearsal-") as folder:
            yield folder
        return
    folder = join(scratch, f"patchstream-rehearsal-{uuid.uuid4().hex[:12]}")
    try:
        yield folder
    finally:
        fs, path = filesystem(folder, storage_options)
        with suppress(FileNotFoundError):
            fs.rm(path, recursive=True)


def steady_rate(seen: list[tuple[float, int]], since: int, until: int) -> float:
    """Rows a second from the first look at (time, rows done) with `since` rows done to the last with at most `until`.

    With fewer than two such looks, over all there are; 0 where there is only one.
    """
    counted = [look for look in seen if since <= look[1] <= until]
    if len(counted) < 2:
        counted = seen
    (first, before), (last, after) = (counted[0], counted[-1]) if counted else ((0.0, 0), (0.0, 0))
    return (after - before) / (last - first) if last > first else 0.0
