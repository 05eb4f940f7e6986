"""Arrow on the outside, NumPy on the inside: what every predictor shares."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas.tables import LABEL, FeatureSize, output_fields, predicted_schema, user_fields

_EXPONENT = np.uint16(0x7C00)

Floats = npt.NDArray[np.floating]
Numbers = npt.NDArray[np.number]


class Wanted(NamedTuple):
    """What a predictor has to deliver: features by name and size, and the best `labels` of `label_names`."""

    features: tuple[str, ...]
    dims: tuple[FeatureSize, ...]
    feature_dtype: str
    labels: int
    label_names: tuple[str, ...]
    multi_label: bool

    @property
    def fields(self) -> list[pa.Field]:
        """Output fields, in the order of the file."""
        sizes = dict(zip(self.features, self.dims, strict=True))
        return output_fields(sizes, self.feature_dtype, self.labels > 0)

    @property
    def widths(self) -> dict[str, int]:
        """Lengths of the features that are one vector for each image."""
        return {name: size for name, size in zip(self.features, self.dims, strict=True) if isinstance(size, int)}


class Predictions(NamedTuple):
    """Arrays for n images: vectors (n, D) float32, patches (n, N, D) float16, visual tokens (n, N) int32.

    Scores and indices are (n, k), best first, or None.
    """

    features: Mapping[str, Numbers]
    scores: Floats | None = None
    indices: npt.NDArray[np.integer] | None = None


def good_rows(decoded: pa.Table) -> npt.NDArray[np.intp]:
    """Positions in the batch of the rows that have pixels."""
    return np.flatnonzero(pc.is_valid(decoded["pixels"]).to_numpy())


def pixels_of(decoded: pa.Table, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Pixels of the rows that have some, (n, height, width, 3) uint8: a view of the Arrow buffer where it can be.

    All pictures of a run have one size and a failed row holds no bytes, so the values lie end to end.
    """
    column = decoded["pixels"]
    views = [_values(chunk) for chunk in column.chunks]
    flat = views[0] if len(views) == 1 else np.concatenate(views or [np.empty(0, np.uint8)])
    return flat.reshape(-1, height, width, 3)


def _values(chunk: pa.Array) -> npt.NDArray[np.uint8]:
    offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    if chunk.buffers()[2] is None or not len(chunk):
        return np.empty(0, np.uint8)
    data = np.frombuffer(chunk.buffers()[2], np.uint8)
    if not chunk.null_count:
        return data[offsets[0] : offsets[-1]]
    valid = pc.is_valid(chunk).to_numpy(zero_copy_only=False)
    lengths = np.diff(offsets)
    if not lengths[~valid].any():
        return data[offsets[0] : offsets[-1]]
    return np.concatenate(
        [data[a:b] for a, b, ok in zip(offsets[:-1], offsets[1:], valid, strict=True) if ok] or [np.empty(0, np.uint8)]
    )


def predicted_table(
    decoded: pa.Table, good: npt.NDArray[np.intp], predictions: Predictions, wanted: Wanted, predict_s: float
) -> pa.Table:
    """The predicted table for a decoded one; `predictions` belong to the rows `good`.

    A row whose features, as they are stored, or scores are not finite becomes a failure. `predict_s` is shared out over
    good rows.
    """
    rows = decoded.num_rows
    computed = predictions.features
    predictions = predictions._replace(features=_as_stored(computed, wanted))
    finite = _finite(predictions, len(good))
    columns = {name: decoded[name] for name in decoded.column_names if name not in {"pixels", "predict_s"}}
    if not finite.all():
        bad = np.zeros(rows, bool)
        bad[good[~finite]] = True
        columns |= _mark_failed(decoded, bad, "NotFinite", _not_finite(computed, predictions.features), False)
    kept = good[finite]
    for field in wanted.fields:
        if field.name == "labels":
            columns["labels"] = _labels(predictions, finite, kept, rows, wanted)
        else:
            values = predictions.features[field.name]
            # Patch features are up to 128 MiB: copied only where a row has to go.
            columns[field.name] = _feature(values if finite.all() else values[finite], kept, rows, field)
    seconds = np.zeros(rows, np.float32)
    seconds[good] = predict_s / max(len(good), 1)
    columns["predict_s"] = pa.array(seconds)
    schema = predicted_schema(wanted.fields, user_fields(decoded.schema))
    return pa.table([columns[name] for name in schema.names], schema=schema)


def failed_table(
    decoded: pa.Table, good: npt.NDArray[np.intp], wanted: Wanted, error: str, message: str, *, retryable: bool
) -> pa.Table:
    """A predicted table in which all rows that had pixels failed in the predict stage."""
    bad = np.zeros(decoded.num_rows, bool)
    bad[good] = True
    columns = {name: decoded[name] for name in decoded.column_names if name != "pixels"}
    columns |= _mark_failed(decoded, bad, error, message, retryable)
    schema = predicted_schema(wanted.fields, user_fields(decoded.schema))
    for field in wanted.fields:
        columns[field.name] = pa.nulls(decoded.num_rows, field.type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _as_stored(features: Mapping[str, Numbers], wanted: Wanted) -> dict[str, Numbers]:
    """`features` in the types of their fields: of what float16 cannot hold, infinity is left."""
    kinds = {field.name: _leaf(field.type).to_pandas_dtype() for field in wanted.fields}
    with np.errstate(over="ignore"):
        return {name: np.asarray(values, kinds[name]) for name, values in features.items()}


def _not_finite(computed: Mapping[str, Numbers], stored: Mapping[str, Numbers]) -> str:
    """The message for images of which some numbers are not finite as they are stored."""
    wide = [name for name in stored if np.isinf(stored[name]).any() and not np.isinf(computed[name]).any()]
    if not wide:
        return "the model gave NaN or infinity for this image"
    return (
        f"the model gave NaN or infinity for this image, or a number of `{wide[0]}` is too large for float16, which "
        "--feature-dtype float32 holds"
    )


def _finite(predictions: Predictions, count: int) -> npt.NDArray[np.bool_]:
    finite = np.ones(count, bool)
    for values in predictions.features.values():
        # NumPy cannot tell the width of nothing, and a batch may hold broken pictures alone.
        finite &= _finite_rows(values.reshape(count, math.prod(values.shape[1:])))
    if predictions.scores is not None:
        finite &= np.isfinite(predictions.scores).all(axis=1)
    return finite


def _finite_rows(values: Numbers) -> npt.NDArray[np.bool_]:
    """For each row of (n, D), whether all of it is finite. Of patch features, a fifth of NumPy's own time: in float16
    exactly infinities and NaN have all five bits of the exponent set."""
    if values.dtype != np.float16 or not values.shape[1]:
        return np.asarray(np.isfinite(values).all(axis=1))
    exponents = np.ascontiguousarray(values).view(np.uint16) & _EXPONENT
    return np.asarray(exponents.max(axis=1) < _EXPONENT)


def _mark_failed(
    decoded: pa.Table, bad: npt.NDArray[np.bool_], error: str, message: str, retryable: bool
) -> dict[str, pa.ChunkedArray]:
    mask = pa.array(bad)
    values = {"stage": "predict", "error": error, "message": message, "retryable": retryable}
    marked = {name: pc.if_else(mask, value, decoded[name]) for name, value in values.items()}
    attempts = pc.if_else(mask, pa.scalar(1, pa.int32()), decoded["attempts"])
    return {**marked, "attempts": attempts}


def _feature(values: Numbers, kept: npt.NDArray[np.intp], rows: int, field: pa.Field) -> pa.Array:
    """Fixed-size lists, nested as `field` says; null in rows that are not in `kept`."""
    if len(kept) == rows:
        items = _lists(np.ascontiguousarray(values).reshape(-1), field.type.value_type)
        return pa.FixedSizeListArray.from_arrays(items, type=field.type)
    spread = np.zeros((rows, *values.shape[1:]), values.dtype)
    spread[kept] = values
    missing = np.ones(rows, bool)
    missing[kept] = False
    items = _lists(spread.reshape(-1), field.type.value_type)
    return pa.FixedSizeListArray.from_arrays(items, type=field.type, mask=pa.array(missing))


def _leaf(kind: pa.DataType) -> pa.DataType:
    return _leaf(kind.value_type) if pa.types.is_fixed_size_list(kind) else kind


def _lists(flat: Numbers, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(flat, kind)
    return pa.FixedSizeListArray.from_arrays(_lists(flat, kind.value_type), type=kind)


def _labels(
    predictions: Predictions, finite: npt.NDArray[np.bool_], kept: npt.NDArray[np.intp], rows: int, wanted: Wanted
) -> pa.Array:
    if predictions.scores is None or predictions.indices is None:
        raise ValueError("labels are wanted but the model gave no scores")
    indices = predictions.indices[finite].reshape(-1)
    names = pa.array(wanted.label_names, pa.string()).take(pa.array(indices, pa.int64()))
    scores = pa.array(predictions.scores[finite].reshape(-1), pa.float32())
    values = pa.StructArray.from_arrays([pa.array(indices, pa.int32()), names, scores], fields=list(LABEL))
    lengths = np.zeros(rows, np.int32)
    lengths[kept] = wanted.labels
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    missing = np.ones(rows, bool)
    missing[kept] = False
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(missing))


def top_labels(logits: Floats, scores: Floats, k: int) -> tuple[Floats, npt.NDArray[np.intp]]:
    """The `k` best of each row: scores (n, k) and their indices (n, k), best first, ties by lower index.

    Logits decide: all scores behind one that is almost certain may be 0 in float32.
    """
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order
