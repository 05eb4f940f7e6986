"""How far the features in 8 bits are from those in float32, on a run's own first images, before it begins."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.decoding import DecodeJob, decode_rows
from pipeline.models import ModelInfo
from pipeline.models.precision import LEAST_MEDIAN
from pipeline.opening import Question
from pipeline.placement import Placement
from pipeline.predicting import actor_job
from pipeline.predictors.actor import ActorJob, build_predictor
from pipeline.predictors.batches import Wanted, good_rows, pixels_of
from schemas.attempt import Distance
from schemas.errors import SpecError

IMAGES = 16
Floats = npt.NDArray[np.floating[Any]]


def measure_distance(question: Question, placement: Placement, ranges: pa.Table, decode: DecodeJob) -> Distance | None:
    """Cosine of the features to those in float32 over the rows of `ranges`; None where no image has features in both.

    Decoded as the job itself does it, so that a picture that kills its decoder does so once. Where several vectors are
    asked for, the lesser cosine of an image counts. Raises SpecError where the median is below LEAST_MEDIAN: this
    precision is not for this model.
    """
    spec = question.spec
    assert question.info is not None
    question = question._replace(wanted=vectors_only(question.info, question.wanted))
    decoded = pa.concat_tables(decode_rows(ranges, decode))
    if not len(good_rows(decoded)):
        return None
    pixels = pixels_of(decoded, *question.preprocessing.output_size)
    # One call alone has all the cores of an actor.
    job = actor_job(question, placement)._replace(threads=placement.threads * placement.actor_calls)
    ours = _features(job, pixels)
    # On a GPU a predictor is warmed at its batch size, which in float32 would take longer than all else here.
    exact = _features(job._replace(dtype="float32", batch_size=min(job.batch_size, IMAGES)), pixels)
    return compare(question.dtype, ours, exact, spec.model)


def compare(dtype: str, ours: Mapping[str, Floats], exact: Mapping[str, Floats], model: str) -> Distance | None:
    """Distance of features in `dtype` to `exact` ones, each (n, D) by name; see `measure_distance`.

    Images that have no direction in float32 (zeros, NaN) do not count. One that lost it in `dtype` counts as 0.
    """
    judged = np.all([np.isfinite(cosines(values, values)) for values in exact.values()], axis=0)
    if not judged.any():
        return None
    least = np.nan_to_num(np.min([cosines(ours[name], exact[name]) for name in exact], axis=0)[judged])
    found = Distance(dtype=dtype, images=len(least), median=float(np.median(least)), least=float(least.min()))
    if found.median < LEAST_MEDIAN:
        raise SpecError(
            f"--dtype {dtype}: on {found.images} of these images the features of {model} have a median cosine of "
            f"{found.median:.4f} to those in float32, less than {LEAST_MEDIAN:g}; use --dtype auto"
        )
    return found


def vectors_only(info: ModelInfo, wanted: Wanted) -> Wanted:
    """`cls` and `pooled` of what is wanted, or `pooled` where neither is."""
    sizes = {"cls": info.hidden_size, "pooled": info.pooled_size}
    names = tuple(name for name in wanted.features if name in sizes) or ("pooled",)
    return wanted._replace(features=names, dims=tuple(sizes[name] for name in names), labels=0)


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
