"""Cosines to float32: what counts, and what stops a run."""

import numpy as np
import pytest

from pipeline.distance import compare, cosines, rows_to_measure
from schemas.errors import SpecError

GOOD = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
BAD = np.array([[0.0, 0.0], [np.nan, 1.0]])


def test_cosines_of_rows() -> None:
    assert cosines(GOOD, 3 * GOOD) == pytest.approx([1.0, 1.0, 1.0])
    assert cosines(GOOD, GOOD[:, ::-1]) == pytest.approx([0.0, 0.0, 1.0])
    assert np.isnan(cosines(BAD, BAD)).all()


def test_images_without_a_direction_in_float32_do_not_count() -> None:
    """NaN in the record of an attempt could not be read again."""
    both = np.concatenate([GOOD, BAD])
    found = compare("int8", {"cls": both}, {"cls": both}, "model")
    assert found is not None
    assert (found.images, found.median, found.least) == (3, pytest.approx(1.0), pytest.approx(1.0))
    assert compare("int8", {"cls": BAD}, {"cls": BAD}, "model") is None


def test_a_precision_that_loses_them_is_refused() -> None:
    lost = np.full_like(GOOD, np.nan)
    found = compare("int8", {"cls": np.concatenate([GOOD, lost[:1]])}, {"cls": np.concatenate([GOOD, GOOD[:1]])}, "m")
    assert found is not None
    assert found.least == 0
    with pytest.raises(SpecError, match=r"median cosine of 0\.0000 to those in float32"):
        compare("int8", {"cls": lost}, {"cls": GOOD}, "m")


def test_the_lesser_of_several_vectors_counts() -> None:
    turned = GOOD @ np.array([[0.999, 0.0447], [-0.0447, 0.999]])
    found = compare("int8", {"cls": turned, "pooled": GOOD}, {"cls": GOOD, "pooled": GOOD}, "m")
    assert found is not None
    assert found.median == pytest.approx(0.999, abs=1e-4)


@pytest.mark.parametrize(
    ("rows", "first", "tried"), [(5, 5, 5), (16, 16, 16), (40, 16, 40), (300, 16, 256), (10**9, 16, 256)]
)
def test_pictures_are_looked_for_in_front_and_all_over(rows: int, first: int, tried: int) -> None:
    rest = np.array([[7, 7 + rows // 2], [10 + rows // 2, 10 + rows]])
    looks = [[(span["start"], span["stop"]) for span in look.to_pylist()] for look in rows_to_measure(rest)]
    spans = [span for look in looks for span in look]
    assert sum(stop - start for start, stop in looks[0]) == first
    assert spans[0][0] == 7
    assert sum(stop - start for start, stop in spans) == tried
    assert spans == sorted(spans)
    assert spans[-1][1] > 7 + 0.9 * rows
