"""Sets of rows as ranges, held against Python's own sets."""

import numpy as np
import pytest

from pipeline.sinks import intervals


def rows_of(spans: np.ndarray) -> set[int]:
    return {row for start, stop in spans.tolist() for row in range(start, stop)}


def is_canonical(spans: np.ndarray) -> bool:
    """Sorted, not empty, not touching."""
    return bool(np.all(spans[:, 0] < spans[:, 1]) and np.all(spans[1:, 0] > spans[:-1, 1]))


@pytest.mark.parametrize("seed", range(30))
def test_like_sets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = (rng.choice(60, size=rng.integers(0, 50), replace=False) for _ in range(3))
    spans = [intervals.from_rows(part) for part in (a, b, c)]
    sets = [set(part.tolist()) for part in (a, b, c)]
    union = intervals.union(spans)
    assert is_canonical(union)
    assert rows_of(union) == sets[0] | sets[1] | sets[2]
    twice = (sets[0] & sets[1]) | (sets[0] & sets[2]) | (sets[1] & sets[2])
    assert rows_of(intervals.overlap(spans)) == twice
    assert rows_of(intervals.complement(union, 5, 55)) == set(range(5, 55)) - rows_of(union)
    assert rows_of(intervals.intersect(spans[0], 10, 40)) == {row for row in sets[0] if 10 <= row < 40}
    assert intervals.count(spans[0]) == len(sets[0])
    asked = np.arange(-2, 62)
    assert set(asked[intervals.contains(union, asked)].tolist()) == rows_of(union)


def test_a_row_given_twice_is_covered_twice() -> None:
    spans = intervals.from_rows(np.array([3, 4, 4, 5]))
    assert rows_of(intervals.overlap([spans])) == {4}
    assert rows_of(intervals.union([spans])) == {3, 4, 5}


def test_nothing_pending_in_an_empty_manifest() -> None:
    assert len(intervals.complement(intervals.EMPTY, 0, 0)) == 0


def test_a_billion_rows_are_one_range() -> None:
    done = np.array([[0, 10**9]])
    assert intervals.complement(done, 0, 10**9 + 5).tolist() == [[10**9, 10**9 + 5]]
