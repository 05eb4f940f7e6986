"""Labels to learn from: a column that rode along, or a CSV file that names rows."""

import csv
import io
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.retrieval.addresses import different_pictures, named_rows, newest
from pipeline.retrieval.arrays import Ints
from pipeline.retrieval.matrix import Matrix
from pipeline.retrieval.query import quote
from pipeline.retrieval.store import FeatureStore
from pipeline.small_files import Unreadable, read_small
from pipeline.storage import Options, redact
from schemas.errors import SpecError

# The first of them that a file has names its rows: an address is no other table's, a number may be.
_KEYS = ("uri", "row", "name")
_SHOWN = 5


@dataclass(frozen=True)
class Labelled:
    """`positions` (n,) in the matrix, ascending, and `codes` (n,) into `classes`, which are in sorted order.

    `pictures` (n,) are equal for files of the same bytes; None: no two are known to be such.
    """

    positions: Ints
    codes: Ints
    classes: list[str]
    pictures: Ints | None = None

    def take(self, chosen: Ints) -> "Labelled":
        """Some of them, of the same classes."""
        pictures = None if self.pictures is None else self.pictures[chosen]
        return Labelled(self.positions[chosen], self.codes[chosen], self.classes, pictures)

    def members(self) -> list[Ints]:
        """For each class, where its examples stand, ascending. One sort, however many classes there are."""
        order = np.argsort(self.codes, kind="stable")
        bounds = np.searchsorted(self.codes[order], np.arange(len(self.classes) + 1))
        return [order[start:stop] for start, stop in pairwise(bounds)]

    def distinct(self) -> list[Ints]:
        """`members`, but of the files of one picture only the first."""
        if self.pictures is None:
            return self.members()
        return [
            examples[np.sort(np.unique(self.pictures[examples], return_index=True)[1])] for examples in self.members()
        ]


@dataclass(frozen=True)
class RowLabels:
    """Ids of rows (n,) and their labels (n,), from `source`: a column or a file.

    Of the `named` names in a file, `unknown` are those that no row has.
    """

    source: str
    rows: Ints
    labels: list[str]
    named: int = 0
    unknown: tuple[str, ...] = ()


def labels_from_column(store: FeatureStore, column: str) -> RowLabels:
    """Labels in a column of `images/`. Raises SpecError if there is no such column."""
    label = column_text(store, column, "--label-column")
    # An empty cell of a CSV is an empty text, and no class.
    found = store.sql(f"SELECT row, {label} AS label FROM images WHERE trim({label}) <> ''")
    return RowLabels(f"column {column}", found.column("row").to_numpy(), found.column("label").to_pylist())


def column_text(store: FeatureStore, column: str, option: str) -> str:
    """SQL for a column of `images/` as text. Raises SpecError naming the option if there is none, or it holds lists."""
    if column not in store.schema.names:
        raise SpecError(f"{option} {column}: images/ has the columns {', '.join(store.schema.names)}")
    kind = store.schema.field(column).type
    if pa.types.is_nested(kind):
        raise SpecError(f"{option} {column}: holds {kind}, which is no label; name a column of texts or numbers")
    return f"CAST({quote(store.sql_name(column))} AS VARCHAR)"


def labels_from_csv(store: FeatureStore, path: str, storage_options: Mapping[str, Any] = {}) -> RowLabels:
    """Labels in a CSV, anywhere, with the column `label` and `uri`, `row` or `name` (the last part of the uri).

    Replaced rows get none by uri or name. Raises SpecError if the file is no such table, contradicts itself, names no
    row of the run, or goes by a name or an address that several pictures have.
    """
    text, path = _read_text(path, storage_options), redact(path)
    key, named = _read_csv(text, path)
    rows, shared, others = _rows_by_key(store, key, named)
    ambiguous = [name for name in named if name in shared]
    if ambiguous:
        raise SpecError(
            f"--labels {path}: {len(ambiguous):,} of its {len(named):,} names belong to several pictures, such as "
            f"{' and '.join(shared[ambiguous[0]])}; name them by `uri` in place of `name`"
        )
    if unlike := different_pictures(store, [rows[name] for name in named if name in rows]):
        name = next(name for name in named if rows.get(name) is unlike)
        raise SpecError(
            f"--labels {path}: the `{key}` {name} is that of {named_rows(unlike)}, which hold different pictures; name "
            f"them by `row` in place of `{key}`"
        )
    labels = _labels_of_rows(path, named, rows)
    if not labels:
        raise SpecError(
            f"--labels {path}: none of its {len(named)} names is a `{key}` of this run.\n"
            f"  in the file: {', '.join(list(named)[:_SHOWN])}\n  in the run:  {', '.join(others)}"
        )
    unknown = tuple(name for name in named if name not in rows)
    return RowLabels(path, np.array(list(labels)), list(labels.values()), len(named), unknown)


def _labels_of_rows(path: str, named: dict[str, str], rows: dict[str, list[int]]) -> dict[int, str]:
    """The label of each row that has one. Raises SpecError for a row that two names give two labels."""
    labels: dict[int, str] = {}
    name_of: dict[int, str] = {}
    for name, label in named.items():
        for row in rows.get(name, ()):
            first = name_of.setdefault(row, name)
            if labels.setdefault(row, label) != label:
                raise SpecError(
                    f"--labels {path}: {first} is `{labels[row]}` and {name} is `{label}`, and both are names of row "
                    f"{row}; leave one of them out"
                )
    return labels


def _read_text(path: str, storage_options: Options) -> str:
    try:
        # There may be a line for each image, so it may be any size.
        return read_small(path, storage_options, most_bytes=None).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"--labels {redact(path)}: not a CSV file in UTF-8 ({error})") from None
    except Unreadable as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        said = "no such file" if missing else f"cannot be read as a file ({error}); give a CSV file"
        raise SpecError(f"--labels {redact(path)}: {said}") from None


def _read_csv(text: str, path: str) -> tuple[str, dict[str, str]]:
    """The column that names rows, and the label of each name in it."""
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        fields = reader.fieldnames or []
        key = next((name for name in _KEYS if name in fields), None)
        if key is None or "label" not in fields:
            raise SpecError(
                f"--labels {path}: needs a column `label` and one of {', '.join(_KEYS)}; it has {', '.join(fields)}"
            )
        if key == "row" and "name" in fields:
            raise SpecError(
                f"--labels {path}: has both `row` and `name`, and a `row` of another table would name other "
                "pictures; leave one of them out"
            )
        return key, _labels_by_name(path, reader, key)
    except csv.Error as error:
        raise SpecError(f"--labels {path}: not a CSV file in UTF-8 ({error})") from None


def _labels_by_name(path: str, reader: "csv.DictReader[str]", key: str) -> dict[str, str]:
    named: dict[str, str] = {}
    for item in reader:
        # A line that is too short has None in its last columns.
        label, name = (item["label"] or "").strip(), item[key] or ""
        if not label:
            continue
        if not name.strip():
            raise SpecError(f"--labels {path}: line {reader.line_num} has no `{key}`; fill it in, or leave it out")
        name = _AS_STORED[key](name)
        if named.setdefault(name, label) != label:
            advice = "; if they are two pictures of one name, name them by `uri`" if key == "name" else ""
            raise SpecError(
                f"--labels {path}: line {reader.line_num} says that `{key}` {name} is `{label}`, and a line before it "
                f"that it is `{named[name]}`; leave one of them{advice}"
            )
    return named


def _row_number(text: str) -> str:
    """`7` for `7.0`, as pandas writes a column of numbers that has gaps."""
    whole = re.fullmatch(r"\s*([0-9]{1,18})(\.0*)?\s*", text)
    return str(int(whole[1])) if whole else text


# Addresses are stored without their signatures.
_AS_STORED: dict[str, Callable[[str], str]] = {"row": _row_number, "uri": redact, "name": str}


def _rows_by_key(
    store: FeatureStore, key: str, wanted: Container[str]
) -> tuple[dict[str, list[int]], dict[str, tuple[str, str]], list[str]]:
    """Ids of the rows of each `wanted` name; for one of several pictures, two of their addresses; a few other names."""
    table = store.table(["row"] if key == "row" else ["row", "uri"])
    if key != "row":
        table = table.filter(pa.array(newest(store, table.column("row").to_numpy())))
    names: dict[str, list[int]] = {}
    first: dict[str, str] = {}
    shared: dict[str, tuple[str, str]] = {}
    others: list[str] = []
    for batch in table.to_batches():
        columns = batch.to_pydict()
        for row, uri in zip(columns["row"], columns.get("uri", columns["row"]), strict=True):
            for name in _names(uri) if key == "name" else (str(uri),):
                if name in wanted:
                    names.setdefault(name, []).append(row)
                    # Whether several rows of one address are one picture, their bytes say.
                    if first.setdefault(name, uri) != uri:
                        shared.setdefault(name, (first[name], uri))
                elif len(others) < _SHOWN and name not in others:
                    others.append(name)
    return names, shared, others


def _names(uri: str) -> tuple[str, ...]:
    """The last part of an address. That of a web address has two: a query may sign, or tell images apart."""
    name = uri.rpartition("/")[2]
    if not uri.startswith(("http://", "https://")):
        return (name,)
    return tuple(dict.fromkeys((name, uri.partition("?")[0].rpartition("/")[2])))


def locate(matrix: Matrix, found: RowLabels, copies: tuple[Ints, Ints] | None = None) -> Labelled:
    """The labels of rows whose vector can be used. Raises SpecError if those are of fewer than two classes.

    `copies` are ids of rows whose bytes occur more than once, and for each one row that stands for all of the same
    bytes, as `duplicates.same_bytes` gives them.
    """
    positions = matrix.positions_of(found.rows)
    usable = (positions >= 0) & matrix.usable[positions]
    classes = sorted({label for label, use in zip(found.labels, usable, strict=True) if use})
    if len(classes) < 2:
        have = f"only the class `{classes[0]}`" if classes else "no class"
        raise SpecError(
            f"{found.source}: {int(usable.sum())} labelled rows with {have}; a probe needs at least two classes"
        )
    code_of = {name: code for code, name in enumerate(classes)}
    codes = np.array([code_of.get(label, -1) for label in found.labels])[usable]
    order = np.argsort(positions[usable], kind="stable")
    kept = positions[usable][order]
    if copies is None:
        return Labelled(kept, codes[order], classes)
    at, pictures = matrix.positions_of(copies[0]), matrix.rows.copy()
    known = at >= 0  # parts that were compacted meanwhile may hold newer rows
    pictures[at[known]] = copies[1][known]
    return Labelled(kept, codes[order], classes, pictures[kept])


def split(labelled: Labelled, share: float, rng: np.random.Generator) -> tuple[Labelled, Labelled]:
    """Two parts, the second with about `share` of the pictures of each class, but never the last one of a class.

    Files of the same bytes are one picture: in both parts, they would be known before they are asked for. Raises
    SpecError if the second would be empty.
    """
    second = np.zeros(len(labelled.codes), np.bool_)
    for examples in labelled.members():
        members = rng.permutation(examples)
        names = members if labelled.pictures is None else labelled.pictures[members]
        _, first, number = np.unique(names, return_index=True, return_inverse=True)
        place = np.argsort(np.argsort(first))[number]  # of its picture, as pictures turn up in `members`
        second[members[place < min(len(first) - 1, max(1, round(share * len(first))))]] = True
    if not second.any():
        raise SpecError(
            "every class has a single example, with files of the same bytes counted once: nothing is left to test on; "
            "label a few more rows"
        )
    return labelled.take(np.flatnonzero(~second)), labelled.take(np.flatnonzero(second))


def shots(labelled: Labelled, count: int, rng: np.random.Generator) -> Labelled:
    """`count` different pictures of each class. Raises SpecError if a class has fewer."""
    check_shots(labelled, count)
    chosen = [rng.choice(examples, count, replace=False) for examples in labelled.distinct()]
    return labelled.take(np.sort(np.concatenate(chosen)))


def check_shots(labelled: Labelled, count: int) -> None:
    """Raises SpecError if a class has fewer than `count` different pictures."""
    sizes = [len(examples) for examples in labelled.distinct()]
    code = int(np.argmin(sizes))
    if sizes[code] < count:
        raise SpecError(
            f"--shots {count}: class `{labelled.classes[code]}` has {sizes[code]} examples to learn from, with files "
            "of the same bytes counted once; ask for fewer, or label more"
        )
