"""How far the features in 8 bits are from those in float32, on a run's own first images, before it begins."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.images.stage import fetch_and_decode
from pipeline.opening import Question
from pipeline.placement import Placement
from pipeline.predicting import actor_job
from pipeline.predictors.actor import build_predictor
from pipeline.predictors.batches import good_rows, pixels_of
from schemas.attempt import Distance
from schemas.errors import SpecError

IMAGES = 16
# Below this, neighbours and labels change: a search would give other pictures.
LEAST_MEDIAN = 0.99
Floats = npt.NDArray[np.floating[Any]]


def measure_distance(question: Question, placement: Placement, manifest: pa.Table) -> Distance | None:
    """Cosine of the features to those in float32 over the images of `manifest`; None where none can be decoded.

    Where several vectors are asked for, the lesser cosine of an image counts. Raises SpecError where the median is
    below LEAST_MEDIAN: this precision is not for this model.
    """
    spec = question.spec
    question = _vectors_only(question)
    (decoded,) = fetch_and_decode(
        manifest,
        preprocessing=question.preprocessing,
        fetch=spec.fetch,
        decode=spec.decode,
        image_column=spec.image_column,
        storage_options=spec.storage_options,
        batch_rows=manifest.num_rows,
    )
    if not len(good_rows(decoded)):
        return None
    pixels = pixels_of(decoded, *question.preprocessing.output_size)
    ours, exact = (
        _features(question._replace(dtype=dtype), placement, pixels) for dtype in (question.dtype, "float32")
    )
    least = np.min([cosines(ours[name], exact[name]) for name in exact], axis=0)
    found = Distance(dtype=question.dtype, images=len(least), median=float(np.median(least)), least=float(least.min()))
    if found.median < LEAST_MEDIAN:
        raise SpecError(
            f"--dtype {found.dtype}: on {found.images} of these images the features of {spec.model} have a median "
            f"cosine of {found.median:.4f} to those in float32, less than {LEAST_MEDIAN:g}; use --dtype auto"
        )
    return found


def _vectors_only(question: Question) -> Question:
    """The same question for `cls` and `pooled`, or for `pooled` where neither is asked for."""
    info, wanted = question.info, question.wanted
    assert info is not None
    sizes = {"cls": info.hidden_size, "pooled": info.pooled_size}
    names = tuple(name for name in wanted.features if name in sizes) or ("pooled",)
    return question._replace(
        wanted=wanted._replace(features=names, dims=tuple(sizes[name] for name in names), labels=0)
    )


def _features(question: Question, placement: Placement, pixels: npt.NDArray[np.uint8]) -> Mapping[str, Floats]:
    predictor: Any = build_predictor(actor_job(question, placement))
    found: Mapping[str, Floats] = predictor.predict(pixels).features
    return found


def cosines(a: Floats, b: Floats) -> Floats:
    """Cosine between corresponding rows (n, …) → (n,)."""
    a, b = (side.reshape(len(side), -1).astype(np.float64) for side in (a, b))
    found: Floats = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return found
