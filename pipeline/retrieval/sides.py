"""What a probe learns from and what it is tested on, where a column of the run's own says so."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.retrieval.labels import Labelled, column_text
from pipeline.retrieval.matrix import Matrix
from pipeline.retrieval.query import literal
from pipeline.retrieval.store import FeatureStore
from schemas.errors import SpecError

# Who marks both validation and test rows trained on neither.
TEST_MARKS = ("test", "val", "valid", "validation")
_SHOWN = 5


class Sides(NamedTuple):
    """Labelled rows to learn from and to test on. `marks` counts the latter by what `column` says of them.

    `left_out` rows are in neither: they are not marked, but have the bytes of one that is.
    """

    rest: Labelled
    test: Labelled
    marks: dict[str, int]
    left_out: int


def split_by_column(store: FeatureStore, matrix: Matrix, labelled: Labelled, column: str) -> Sides:
    """Rows that `column` marks with one of TEST_MARKS, whatever the case, are to test on; all others to learn from.

    But of the files of one picture on both sides, those to learn from are left out: it would be known before it is
    asked for. Raises SpecError if there is no such column, either side is empty, or a class has no row to learn from.
    """
    value = f"lower(trim({column_text(store, column, '--split-column')}))"
    marks = ", ".join(literal(mark) for mark in TEST_MARKS)
    marked = store.sql(f"SELECT row, {value} AS mark FROM images WHERE {value} IN ({marks})")
    rows = matrix.rows[labelled.positions]
    marked = marked.filter(pa.array(np.isin(marked.column("row").to_numpy(), rows)))
    second = np.isin(rows, marked.column("row").to_numpy())
    if not second.any():
        seen = store.sql(f"SELECT DISTINCT {value} AS mark FROM images WHERE {value} <> '' ORDER BY 1 LIMIT {_SHOWN}")
        there = ", ".join(seen.column("mark").to_pylist()) or "nothing"
        raise SpecError(
            f"--split-column {column}: no labelled row to test on is marked {', '.join(TEST_MARKS)}; the column says "
            f"{there}. Mark some so, or leave the option out, and a fifth of each class is tested"
        )
    tested = second if labelled.pictures is None else np.isin(labelled.pictures, labelled.pictures[second])
    sides = Sides(
        labelled.take(np.flatnonzero(~tested)),
        labelled.take(np.flatnonzero(second)),
        dict(Counter(marked.column("mark").to_pylist())),
        int((tested & ~second).sum()),
    )
    untaught = np.setdiff1d(np.arange(len(labelled.classes)), sides.rest.codes)
    if len(untaught):
        named = ", ".join(f"`{labelled.classes[code]}`" for code in untaught[:_SHOWN])
        copies = ", or have the bytes of a row that is" if sides.left_out else ""
        raise SpecError(
            f"--split-column {column}: {len(untaught):,} of {len(labelled.classes):,} classes have no row to learn "
            f"from, since all of theirs are marked {', '.join(sides.marks)}{copies}: {named}. Mark some of them "
            "train, or leave their labels out"
        )
    return sides
