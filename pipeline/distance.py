"""How far the features in 8 bits are from those in float32, on a run's own images, before it begins."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.decoding import DecodeJob, cut, decoded_tables
from pipeline.models import ModelInfo
from pipeline.models.precision import LEAST_MEDIAN
from pipeline.opening import ResolvedJob
from pipeline.placement import Placement
from pipeline.predicting import actor_job
from pipeline.predictors.actor import ActorJob, build_predictor
from pipeline.predictors.batches import Wanted, pixels_of
from pipeline.sinks import intervals
from pipeline.sinks.intervals import Spans
from schemas.attempt import AttemptRecord, Distance
from schemas.errors import SpecError

IMAGES = 16
# So many times as many rows are tried: broken files and those of other kinds are measured by nobody.
_LOOKS = 16
Floats = npt.NDArray[np.floating[Any]]

log = logging.getLogger(__name__)


def known_distance(records: Iterable[AttemptRecord], dtype: str) -> Distance | None:
    """What an earlier attempt measured in `dtype`: that of the same run, for a directory holds no other."""
    known = [record.distance for record in records if record.distance and record.distance.dtype == dtype]
    return next((distance for distance in known if distance.images), None)


def rows_to_measure(rest: Spans) -> list[pa.Table]:
    """Ranges of pending rows, to be tried in turn until IMAGES pictures are found: the first ones, and others spread
    over all. What is no picture often stands side by side, as macOS's `._photo.jpg` do before all others."""
    apart = max(0, intervals.count(rest) // _LOOKS - IMAGES)
    return [ranges for ranges in islice(cut(rest, [IMAGES, apart] * _LOOKS), 0, None, 2) if ranges.num_rows]


def measure_distance(
    resolved: ResolvedJob, placement: Placement, looks: Sequence[pa.Table], decode: DecodeJob
) -> Distance:
    """Cosine of the features to those in float32 over the first IMAGES pictures in the rows of `looks`, each a table of
    ranges; of 0 images where none has features in both.

    Decoded as the job itself does it, so that a picture that kills its decoder does so once. Where several vectors are
    asked for, the lesser cosine of an image counts. Raises SpecError where the median is below LEAST_MEDIAN: this
    precision is not for this model.
    """
    spec = resolved.spec
    assert resolved.info is not None
    resolved = resolved._replace(wanted=vectors_only(resolved.info, resolved.wanted))
    nothing = Distance(dtype=resolved.dtype, images=0)
    pixels = _first_pictures(looks, decode)
    if not len(pixels):
        return nothing
    # One call alone has all the cores of an actor.
    job = actor_job(resolved, placement)._replace(threads=placement.threads * placement.actor_calls)
    ours = _features(job, pixels)
    # On a GPU a predictor is warmed at its batch size, which in float32 would take longer than all else here.
    exact = _features(job._replace(dtype="float32", batch_size=min(job.batch_size, IMAGES)), pixels)
    return compare(resolved.dtype, ours, exact, spec.model) or nothing


def compare(dtype: str, ours: Mapping[str, Floats], exact: Mapping[str, Floats], model: str) -> Distance | None:
    """Distance of features in `dtype` to `exact` ones, each (n, D) by name; see `measure_distance`.

    Images that have no direction in float32 (zeros, NaN) do not count. One that lost it in `dtype` counts as 0.
    """
    judged = np.all([np.isfinite(cosines(values, values)) for values in exact.values()], axis=0)
    if not judged.any():
        return None
    least = np.nan_to_num(np.min([cosines(ours[name], exact[name]) for name in exact], axis=0)[judged])
    median = float(np.median(least))
    if median < LEAST_MEDIAN:
        raise SpecError(
            f"--dtype {dtype}: on {len(least)} of these images the features of {model} have a median cosine of "
            f"{median:.4f} to those in float32, less than {LEAST_MEDIAN:g}; use --dtype auto in another --out"
        )
    return Distance(dtype=dtype, images=len(least), median=median, least=float(least.min()))


def warn_if_unmeasured(found: Distance, looks: Iterable[pa.Table]) -> None:
    """Tell whoever starts the job if `found` is of no image."""
    if not found.images:
        log.warning(
            "--dtype %s: how far it is from float32 is not known, for none of the %d images that were tried gave "
            "features in both. `patchstream benchmark` measures it on images that can be decoded",
            found.dtype,
            sum(pc.sum(pc.subtract(ranges["stop"], ranges["start"])).as_py() for ranges in looks),
        )


def vectors_only(info: ModelInfo, wanted: Wanted) -> Wanted:
    """`cls` and `pooled` of what is wanted, or `pooled` where neither is."""
    sizes = info.vector_sizes
    names = tuple(name for name in wanted.features if name in sizes) or ("pooled",)
    return wanted._replace(features=names, dims=tuple(sizes[name] for name in names), labels=0)


def _first_pictures(looks: Iterable[pa.Table], decode: DecodeJob) -> npt.NDArray[np.uint8]:
    """The first IMAGES that decode, (n, height, width, 3). Where a store does not answer for a whole look, no further
    one is tried: each may last as long as reads are waited for."""
    height, width = decode.reading.preprocessing.output_size
    found = np.empty((0, height, width, 3), np.uint8)
    for ranges in looks:
        decoded = pa.concat_tables(decoded_tables(ranges, decode))
        found = np.concatenate([found, pixels_of(decoded, height, width)])[:IMAGES]
        away = pc.and_(pc.equal(decoded["stage"], "fetch"), decoded["retryable"])
        if len(found) == IMAGES or pc.all(pc.fill_null(away, False)).as_py():
            break
    return found


def _features(job: ActorJob, pixels: npt.NDArray[np.uint8]) -> Mapping[str, Floats]:
    predictor: Any = build_predictor(job)
    found: Mapping[str, Floats] = predictor.predict(pixels).features
    return found


def cosines(a: Floats, b: Floats) -> Floats:
    """Cosine between corresponding rows (n, …) → (n,); NaN where one is all zeros."""
    a, b = (side.reshape(len(side), -1).astype(np.float64) for side in (a, b))
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return found
