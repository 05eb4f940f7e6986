"""A job without pictures and without a model: measures everything else, and tests the accounting."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.predictors.batches import Predictions, Wanted, predicted_table
from schemas.tables import decoded_schema, user_fields

NULL_DIM = 8


def no_pixels(manifest: pa.Table, batch_rows: int) -> Iterator[pa.Table]:
    """Decoded tables for manifest rows that nobody fetched: no pixels, and no failure either."""
    schema = decoded_schema(user_fields(manifest.schema))
    for start in range(0, manifest.num_rows, batch_rows):
        part = manifest.slice(start, batch_rows)
        known = {name: part[name] for name in part.column_names if name in schema.names}
        columns = [known.get(field.name, pa.nulls(part.num_rows, field.type)) for field in schema]
        yield pa.table(columns, schema=schema)


class NullPredictor:
    """Gives each row features that are a function of its number alone, so that a mix-up would show."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Predicted table for a decoded one; every row succeeds."""
        rows = decoded["row"].to_numpy()
        features = {name: null_features(rows, dim) for name, dim in self._wanted.widths.items()}
        return predicted_table(decoded, np.arange(len(rows)), Predictions(features), self._wanted, 0.0)


def null_features(rows: np.ndarray, dim: int) -> np.ndarray:
    """(n, dim) float32: sin((row + 1) · (column + 1))."""
    return np.sin(np.outer(rows + 1, np.arange(1, dim + 1))).astype(np.float32)
