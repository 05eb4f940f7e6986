"""What becomes of values that are not finite, in each kind of column."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.predictors.batches import Predictions, Wanted, predicted_table, top_labels
from schemas.tables import decoded_schema

ROWS = 5


def decoded() -> pa.Table:
    schema = decoded_schema([])
    known = {"row": pa.array(range(ROWS)), "uri": pa.array([f"file:///{i}.jpg" for i in range(ROWS)])}
    known["pixels"] = pa.array([b"x", b"x", None, b"x", b"x"])
    return pa.table([known.get(field.name, pa.nulls(ROWS, field.type)) for field in schema], schema=schema)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_patch_that_is_not_finite_fails_its_image_alone(bad: float) -> None:
    patches = np.full((4, 6, 3), 65_504, np.float16)
    patches[0] = -65_504
    patches[1] = 6e-8
    patches[2, 5, 2] = bad
    tokens = np.arange(24, dtype=np.int32).reshape(4, 6)
    wanted = Wanted(("patches", "visual_tokens"), ((6, 3), 6), "float32", 0, (), False)
    good = np.array([0, 1, 3, 4])
    table = predicted_table(decoded(), good, Predictions({"patches": patches, "visual_tokens": tokens}), wanted, 1.0)
    assert table["error"].to_pylist() == [None, None, None, "NotFinite", None]
    assert table["patches"].is_valid().to_pylist() == [True, True, False, False, True]
    assert table["visual_tokens"].to_pylist()[4] == tokens[3].tolist()
    np.testing.assert_array_equal(np.array(table["patches"].to_pylist()[4], np.float16), patches[3])
    assert str(table.schema.field("patches").type) == str(wanted.fields[0].type)


def test_a_vector_that_float16_cannot_hold_fails_its_image_alone() -> None:
    vectors = np.full((4, 3), 65_504, np.float32)
    vectors[1, 2] = 65_520  # the least that is rounded to infinity
    wanted = Wanted(("cls",), (3,), "float16", 0, (), False)
    table = predicted_table(decoded(), np.array([0, 1, 3, 4]), Predictions({"cls": vectors}), wanted, 1.0)
    assert table["error"].to_pylist() == [None, "NotFinite", None, None, None]
    assert (
        "a number of `cls` is too large for float16, which --feature-dtype float32 holds" in table["message"][1].as_py()
    )
    assert table["cls"].is_valid().to_pylist() == [True, False, False, True, True]
    assert table["cls"].to_pylist()[4] == [65_504] * 3
    wide = wanted._replace(feature_dtype="float32")
    table = predicted_table(decoded(), np.array([0, 1, 3, 4]), Predictions({"cls": vectors}), wide, 1.0)
    assert table["error"].null_count == len(table)


def test_labels_are_ranked_where_the_scores_of_all_but_the_first_are_zero() -> None:
    logits = np.array([[-900, 0, -300, -300]], np.float32)
    scores, indices = top_labels(logits, np.array([[0, 1, 0, 0]], np.float32), 3)
    assert indices.tolist() == [[1, 2, 3]]
    assert scores.tolist() == [[1, 0, 0]]
