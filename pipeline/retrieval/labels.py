"""Labels to learn from: a column that rode along, or a CSV file that names rows."""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.retrieval.arrays import Ints
from pipeline.retrieval.matrix import Matrix
from pipeline.retrieval.store import FeatureStore, quote
from schemas.errors import SpecError

_KEYS = ("row", "uri", "name")
_SHOWN = 5


@dataclass(frozen=True)
class Labelled:
    """`positions` (n,) in the matrix, ascending, and `codes` (n,) into `classes`, which are in sorted order."""

    positions: Ints
    codes: Ints
    classes: list[str]

    def take(self, chosen: Ints) -> "Labelled":
        """Some of them, of the same classes."""
        return Labelled(self.positions[chosen], self.codes[chosen], self.classes)


def labels_from_column(store: FeatureStore, matrix: Matrix, column: str) -> Labelled:
    """Labels in a column of `images/`. Raises SpecError if there is no such column, or fewer than two classes."""
    if column not in store.schema.names:
        raise SpecError(f"--label-column {column}: images/ has the columns {', '.join(store.schema.names)}")
    label = quote(store.sql_name(column))
    # An empty cell of a CSV is an empty text, and no class.
    found = store.sql(
        f"SELECT row, CAST({label} AS VARCHAR) AS label FROM images WHERE trim(CAST({label} AS VARCHAR)) <> ''"
    )
    return _labelled(matrix, found.column("row").to_numpy(), found.column("label").to_pylist(), f"column {column}")


def labels_from_csv(store: FeatureStore, matrix: Matrix, path: str) -> Labelled:
    """Labels in a CSV with the column `label` and one of `row`, `uri` or `name` (the last part of the uri).

    Raises SpecError if the file is no such table, or names no row of the run.
    """
    key, named = _read_csv(path)
    rows = _rows_by_key(store, key)
    matched = [(row, label) for name, label in named.items() for row in rows.get(name, ())]
    if not matched:
        raise SpecError(
            f"--labels {path}: none of its {len(named)} names is a `{key}` of this run.\n"
            f"  in the file: {', '.join(list(named)[:_SHOWN])}\n  in the run:  {', '.join(list(rows)[:_SHOWN])}"
        )
    return _labelled(matrix, np.array([row for row, _ in matched]), [label for _, label in matched], path)


def _read_csv(path: str) -> tuple[str, dict[str, str]]:
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            fields = reader.fieldnames or []
            key = next((name for name in _KEYS if name in fields), None)
            if key is None or "label" not in fields:
                raise SpecError(
                    f"--labels {path}: needs a column `label` and one of {', '.join(_KEYS)}; it has {', '.join(fields)}"
                )
            return key, {item[key]: item["label"] for item in reader if item["label"]}
    except FileNotFoundError:
        raise SpecError(f"--labels {path}: no such file") from None
    except OSError as error:
        raise SpecError(f"--labels {path}: cannot be read as a file ({error.strerror}); give a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise SpecError(f"--labels {path}: not a CSV file in UTF-8 ({error})") from None


def _rows_by_key(store: FeatureStore, key: str) -> dict[str, list[int]]:
    table = store.table(["row"] if key == "row" else ["row", "uri"])
    rows = table.column("row").to_pylist()
    if key == "row":
        return {str(row): [row] for row in rows}
    names: dict[str, list[int]] = {}
    for row, uri in zip(rows, table.column("uri").to_pylist(), strict=True):
        names.setdefault(uri if key == "uri" else uri.rpartition("/")[2], []).append(row)
    return names


def _labelled(matrix: Matrix, rows: Ints, labels: list[str], source: str) -> Labelled:
    positions = matrix.positions_of(rows)
    usable = (positions >= 0) & matrix.usable[positions]
    classes = sorted({label for label, use in zip(labels, usable, strict=True) if use})
    if len(classes) < 2:
        have = f"only the class `{classes[0]}`" if classes else "no class"
        raise SpecError(f"{source}: {int(usable.sum())} labelled rows with {have}; a probe needs at least two classes")
    code_of = {name: code for code, name in enumerate(classes)}
    codes = np.array([code_of.get(label, -1) for label in labels])[usable]
    order = np.argsort(positions[usable], kind="stable")
    return Labelled(positions[usable][order], codes[order], classes)


def split(labelled: Labelled, share: float, rng: np.random.Generator) -> tuple[Labelled, Labelled]:
    """Two parts, the second with about `share` of each class, but never the last example of one.

    Raises SpecError if the second would be empty.
    """
    second = np.zeros(len(labelled.codes), np.bool_)
    for code in range(len(labelled.classes)):
        members = rng.permutation(np.flatnonzero(labelled.codes == code))
        second[members[: min(len(members) - 1, max(1, round(share * len(members))))]] = True
    if not second.any():
        raise SpecError("every class has a single example: nothing is left to test on; label a few more rows")
    return labelled.take(np.flatnonzero(~second)), labelled.take(np.flatnonzero(second))


def shots(labelled: Labelled, count: int, rng: np.random.Generator) -> Labelled:
    """`count` examples of each class. Raises SpecError if a class has fewer."""
    sizes = Counter(labelled.codes.tolist())
    code, fewest = min(((code, sizes.get(code, 0)) for code in range(len(labelled.classes))), key=lambda item: item[1])
    if fewest < count:
        raise SpecError(f"--shots {count}: class `{labelled.classes[code]}` has {fewest} examples to learn from")
    chosen = [
        rng.choice(np.flatnonzero(labelled.codes == code), count, replace=False)
        for code in range(len(labelled.classes))
    ]
    return labelled.take(np.sort(np.concatenate(chosen)))
