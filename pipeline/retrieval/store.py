"""`FeatureStore`: what a run wrote, as tables, matrices and SQL. It reads `DIR` as it stands and needs nothing else."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

from pipeline.addresses import join
from pipeline.columns import ColumnReads
from pipeline.record import require_record
from pipeline.results import list_results
from pipeline.retrieval.arrays import Floats, Ints, Preparation, Progress, no_progress
from pipeline.retrieval.matrix import Matrix, map_matrix
from pipeline.retrieval.matrix_files import prepare_matrix
from pipeline.retrieval.parts import (
    NoParts,
    Part,
    parts_instead,
    schema_to_be,
    settled_parts,
    stream_part,
)
from pipeline.retrieval.query import MEMORY, execute, literal, quote, run_query, temporary_folder, view_names
from pipeline.settled import list_parquet
from pipeline.storage import Options, filesystem, is_local, redact
from pipeline.store_errors import manifest_error, read_error
from schemas.errors import OutputError, SpecError
from schemas.run import RunRecord
from schemas.spec import VECTOR_NAMES
from schemas.tables import FAILURES_SCHEMA, manifest_schema, user_fields

if TYPE_CHECKING:
    import pandas as pd

_TABLES = ("images", "manifest", "failures")
T = TypeVar("T")


class FeatureStore:
    """A run's directory, opened for reading. Parts that appear after `open` are not seen: open it again.

    What a compaction takes away meanwhile is read from the parts that replaced it, which may hold newer rows too.

    `features` maps each feature's name to its dimension. Rows come in the order of the parts' names everywhere, so
    `matrix(name)[i]` belongs to `rows()[i]` and to `table()[i]`.
    """

    def __init__(
        self, fs: AbstractFileSystem, root: str, record: RunRecord, parts: list[Part], schema: pa.Schema
    ) -> None:
        self.fs = fs
        self.root = root
        self.record = record
        self.parts = parts
        self.schema = schema
        self.features = {name: schema.field(name).type.list_size for name in VECTOR_NAMES if name in schema.names}
        self.progress: Progress = no_progress
        # `parts` stay as they were: matrices go by their order.
        self._parts_now = parts
        self._matrices: dict[str, Matrix] = {}

    @classmethod
    def open(
        cls, directory: str, storage_options: Options | None = None, *, all_failed: bool = False
    ) -> "FeatureStore":
        """Open a run's directory on any store; with `all_failed`, also one that has failures and no image.

        Raises OutputError if it is not a run's, holds no part yet or parts of several models, or if a rewrite of
        parts there was cut short.
        """
        record = require_record(str(directory), storage_options or {})
        fs, root = filesystem(str(directory), storage_options or {})
        root = root.rstrip("/") or root
        try:
            parts, schema = settled_parts(fs, root, record)
        except NoParts:
            if not (all_failed and list_parquet(fs, join(root, "failures"))):
                raise
            parts, schema = [], schema_to_be(fs, root, record)
        return cls(fs, root, record, parts, schema)

    def reread(self, read: Callable[[], T]) -> T:
        """What `read` gives; where parts that it reads are gone, it is asked again with those that replaced them.

        Raises OutputError if they are gone altogether, or if DuckDB cannot read what is there.
        """
        for again in (True, False):
            try:
                return read()
            except (FileNotFoundError, duckdb.Error, SpecError) as error:  # SpecError: what run_query makes of DuckDB's
                instead = parts_instead(self.fs, self.root, self.record, self._parts_now, self.schema)
                if instead is None or not again:
                    if isinstance(error, duckdb.Error):
                        raise OutputError(
                            f"cannot read the tables of {redact(self.root)}: {redact(str(error))}\n`patchstream verify "
                            "DIR` says which part is damaged; a result is made anew by the command that made it"
                        ) from None
                    raise read_error(self.root, error) if isinstance(error, FileNotFoundError) else error from None
                self._parts_now = instead
        raise AssertionError

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    @cached_property
    def replaced(self) -> Ints:
        """Ids of rows that hold an older version of an object, which a later row holds anew."""
        known = pads.field("replaces").is_valid()
        try:
            newer = self.dataset("manifest").to_table(columns=["replaces"], filter=known)
        except (OSError, pa.ArrowException) as error:
            raise manifest_error(join(self.root, "manifest"), error) from error
        rows: Ints = np.unique(newer.column("replaces").to_numpy())
        return rows

    def check_feature(self, name: str) -> int:
        """The dimension of feature `name`. Raises OutputError saying which features there are."""
        if name in self.features:
            return int(self.features[name])
        there = ", ".join(f"{key} ({dim})" for key, dim in self.features.items()) or "none"
        raise OutputError(
            f"{redact(self.root)} holds no feature `{name}`; it has: {there}. Features are chosen when the run starts "
            f"(`patchstream embed … --features {name}`)."
        )

    def load(self, name: str = "cls") -> Matrix:
        """Matrix, row ids and lengths of a feature, memory-mapped; made on the first call for this set of parts.

        Raises OutputError if there is no such feature, or no place on the disk to keep the matrix.
        """
        if name not in self._matrices:
            dim = self.check_feature(name)
            dtype = self.schema.field(name).type.value_type.to_pandas_dtype()
            folder = prepare_matrix(self.fs, self.root, self.record, self.parts, name, dim, dtype, self.progress)
            self._matrices[name] = map_matrix(folder, name, self.replaced)
        return self._matrices[name]

    def matrix(self, name: str = "cls", *, normalise: bool = False, centre: bool = False) -> NDArray[Any]:
        """All vectors of a feature, (N, D), memory-mapped, in the dtype on disk and in the order of `rows()`.

        With an option set, the result is a float32 copy in memory: `centre` takes the mean of the usable vectors
        away, `normalise` scales each to length 1.
        """
        matrix = self.load(name)
        if not (normalise or centre):
            return matrix.vectors
        prepare = self.preparation(name, normalise=normalise, centre=centre)
        return prepare.apply(matrix.vectors.astype(np.float32, copy=False))

    def preparation(self, name: str = "cls", *, normalise: bool = True, centre: bool = False) -> Preparation:
        """How vectors of this feature are made comparable."""
        return Preparation(normalise, self.load(name).mean() if centre else None)

    def iter_features(self, name: str = "cls", batch_rows: int = 8192) -> Iterator[tuple[Ints, Floats]]:
        """Row ids (n,) and vectors (n, D) float32, streamed from the parts; nothing is cached."""
        dim = self.check_feature(name)
        for part in self.parts:
            for rows, vectors in stream_part(self.fs, part, name, dim, batch_rows):
                yield rows, vectors.astype(np.float32, copy=False)

    def rows(self, where: str | None = None) -> Ints:
        """Row ids (N,), or those of the rows for which the SQL condition `where` holds."""
        rows: Ints = self.table(["row"], where).column("row").to_numpy()
        return rows

    def check_filter(self, where: str) -> None:
        """Raise SpecError if DuckDB refuses the condition `where`; no row is read."""
        self.sql(f"SELECT row FROM images WHERE ({where}\n) LIMIT 0")

    def table(self, columns: list[str] | None = None, where: str | None = None) -> pa.Table:
        """Columns of `images/`, all by default, in memory. `where` is a condition in DuckDB's SQL, pushed down.

        Raises SpecError for a column that is not there or a condition that DuckDB refuses, and OutputError where the
        parts that give the rows their order are gone.
        """
        names = columns if columns is not None else self.schema.names
        missing = sorted(set(names) - set(self.schema.names))
        if missing:
            raise SpecError(f"no column {', '.join(missing)} in images/; there are: {', '.join(self.schema.names)}")
        schema = pa.schema([self.schema.field(name) for name in names])
        if where is None:
            try:
                return self._dataset(self.parts).to_table(columns=names)
            except FileNotFoundError as error:
                raise read_error(f"{self.root}/images", error) from error
        selected = ", ".join(quote(self.sql_name(name)) for name in names)
        return self.sql(f"SELECT {selected} FROM images WHERE ({where}\n)").rename_columns(names).cast(schema)

    def sql_name(self, column: str) -> str:
        """What a column of `images/` is called in SQL: its name, unless one before it differs from it in case alone."""
        return self._sql_names[column]

    @cached_property
    def _sql_names(self) -> dict[str, str]:
        # DuckDB ignores case and numbers the later ones: of `format` and `Format` the second becomes `Format_1`.
        names = self.schema.names
        if len({name.casefold() for name in names}) == len(names):
            return {name: name for name in names}
        with self.connect() as connection:
            return dict(zip(names, connection.sql("SELECT * FROM images").columns, strict=True))

    def to_pandas(self, columns: list[str] | None = None, where: str | None = None) -> "pd.DataFrame":
        """`table` as a pandas frame; a vector becomes a NumPy array in its cell."""
        frame: pd.DataFrame = self.table(columns, where).to_pandas()
        return frame

    def dataset(self, kind: str = "images") -> pads.Dataset:
        """`images`, `manifest` or `failures` as a pyarrow dataset; of right schema and without rows if absent."""
        if kind == "images":
            return self._dataset(self._parts_now)
        paths = self._paths(kind)
        if paths:
            return self._parquet(paths)
        empty = FAILURES_SCHEMA if kind == "failures" else manifest_schema(user_fields(self.schema))
        return pads.dataset(empty.empty_table())

    def _dataset(self, parts: list[Part]) -> pads.Dataset:
        if not parts:
            return pads.dataset(self.schema.empty_table())
        return self._parquet([part.path for part in parts], self.schema)

    def _parquet(self, paths: list[str], schema: pa.Schema | None = None) -> pads.Dataset:
        if is_local(self.fs):
            return pads.dataset(paths, schema=schema, filesystem=self.fs)
        inside = [self._inside(path) for path in paths]
        return pads.dataset(inside, schema=schema, filesystem=ColumnReads(self.root, self.fs))

    def _inside(self, path: str) -> str:
        return path.removeprefix(f"{self.root}/")

    def connect(self) -> duckdb.DuckDBPyConnection:
        """A DuckDB connection in memory, of which it takes 2 GiB; what does not fit goes to temporary files.

        Its views are `images`, `manifest`, `failures`, and `clusters_NAME` and `duplicates_NAME` for what there is.
        """
        connection = duckdb.connect(config={"memory_limit": MEMORY, "temp_directory": temporary_folder()})
        if not is_local(self.fs):
            connection.register_filesystem(ColumnReads(self.root, self.fs))
        for kind in _TABLES:
            self.add_view(connection, kind, join(self.root, kind))
        for kind in ("clusters", "duplicates"):
            for name, view in view_names(list_results(self.fs, join(self.root, kind))).items():
                self.add_view(connection, f"{kind}_{view}", join(self.root, kind, name))
        return connection

    def add_view(self, connection: duckdb.DuckDBPyConnection, view: str, folder: str) -> None:
        """A view of the Parquet files in `folder`, or in the parts of the run if `view` is one of its tables."""
        paths = self._paths(view) if view in _TABLES else [path for path, _ in list_parquet(self.fs, folder)]
        if paths:
            # DuckDB claims s3:// and gs:// for its own drivers; under `dir://` it asks ours, with our credentials.
            local = is_local(self.fs)
            files = ", ".join(literal(path if local else f"dir://{self._inside(path)}") for path in paths)
            read = f"SELECT * FROM read_parquet([{files}], hive_partitioning = false)"
            execute(connection, f"CREATE VIEW {quote(view)} AS {read}")
        elif view in _TABLES:
            connection.register(view, self.dataset(view).to_table())

    def _paths(self, kind: str) -> list[str]:
        if kind == "images":
            return [part.path for part in self._parts_now]
        paths = [path for path, _ in list_parquet(self.fs, join(self.root, kind))]
        # A freeze that was cut short leaves manifest parts that the record does not name.
        counted = set(self.record.manifest_parts)
        return [path for path in paths if kind != "manifest" or path.rpartition("/")[2] in counted]

    def sql(self, query: str, folders: Mapping[str, str] | None = None) -> pa.Table:
        """A DuckDB query over the views of `connect` and of other `folders`, by name. Raises SpecError if refused."""

        def ask() -> pa.Table:
            with self.connect() as connection:
                for view, folder in (folders or {}).items():
                    self.add_view(connection, view, folder)
                return run_query(connection, query)

        return self.reread(ask)

    def uris(self, rows: Ints) -> list[str]:
        """The uri of each row id, in the order given. Raises SpecError naming ids that have no image."""
        found = self.lookup(rows, ["uri"])
        missing = [int(row) for row in rows if int(row) not in found]
        if missing:
            raise SpecError(f"row {missing[0]}: no such row in images/ (it may have failed; see failures/)")
        return [found[int(row)]["uri"] for row in rows]

    def lookup(self, rows: Ints, columns: list[str]) -> dict[int, dict[str, Any]]:
        """Columns of some rows of `images`, by row id."""
        wanted = pa.array(np.unique(np.asarray(rows, np.int64)))
        chosen, named = pads.field("row").isin(wanted), ["row", *columns]
        table = self.reread(lambda: self.dataset().to_table(columns=named, filter=chosen))
        return {item["row"]: item for item in table.to_pylist()}
