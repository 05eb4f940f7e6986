"""Opening an output directory for reading: its record, its attempts and the parts of its tables."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from pipeline.addresses import join
from pipeline.attempt_files import as_known, read_attempt
from pipeline.columns import is_damage, open_columns
from pipeline.record import require_record
from pipeline.settled import became_another, is_same_run, list_files, list_parquet, settled_listing
from pipeline.storage import filesystem, redact
from schemas.attempt import AttemptRecord
from schemas.errors import OutputError
from schemas.redaction import one_line
from schemas.run import RunRecord
from schemas.spec import VECTOR_NAMES

BATCH_ROWS = 65_536

T = TypeVar("T")


class PartGone(OutputError):
    """A part that was listed is there no more: it was compacted meanwhile, or the run was replaced."""


@dataclass(frozen=True)
class RunDirectory:
    """An output directory. `root` is its path on `fs`; `url` is what the user gave."""

    url: str
    fs: AbstractFileSystem
    root: str
    record: RunRecord
    attempts: tuple[AttemptRecord, ...]
    storage_options: Mapping[str, Any]

    def parts(self, folder: str) -> list[str]:
        """Paths of the visible Parquet parts under `folder`, sorted; the manifest's are those of the record.

        It waits while parts are being rewritten. Raises OutputError where that lasts.
        """
        if folder == "manifest":
            return [join(self.root, "manifest", name) for name in self.record.manifest_parts]
        place = join(self.root, folder)
        found = next(settled_listing(self.url, self.fs, self.root, lambda: list_parquet(self.fs, place)))
        return [path for path, _ in found]

    def check_same(self) -> None:
        """Raise OutputError if another run stands in the place of this one."""
        if not is_same_run(self.fs, self.root, self.record.run_id):
            raise became_another(self.url)

    def whole_pass(self, read: Callable[[], T]) -> T:
        """What `read` gives, which lists parts and reads them; begun anew where a compaction took some from under it.

        Raises OutputError if another run stands in the place of this one, PartGone where that happens again.
        """
        try:
            return read()
        except PartGone:
            self.check_same()
            return read()

    def features(self) -> dict[str, int]:
        """The feature columns of `images/` and their lengths, `cls` first; empty where there is no part yet."""
        for path in self.parts("images"):
            with open_part(self.fs, path) as part:
                fields = {field.name: field.type for field in part.schema_arrow}
            return {name: fields[name].list_size for name in VECTOR_NAMES if name in fields}
        return {}


def open_run(out: str, storage_options: Mapping[str, Any]) -> RunDirectory:
    """Read `run.json` and `attempts/` of `out`. Raises OutputError if `out` is not the output of a run."""
    record = require_record(out, storage_options)
    fs, root = filesystem(out, storage_options)
    found = (read_attempt(fs, path) for path, _ in list_files(fs, join(root, "attempts"), ".json"))
    attempts = [attempt for attempt in found if attempt is not None]
    # By number, for the clocks of several hosts may disagree.
    attempts = as_known(sorted(attempts, key=lambda attempt: attempt.attempt))
    attempts.sort(key=lambda attempt: (attempt.started, attempt.attempt, attempt.shard_index))
    return RunDirectory(out, fs, root, record, tuple(attempts), storage_options)


@contextmanager
def open_part(fs: AbstractFileSystem, path: str) -> Iterator[pq.ParquetFile]:
    """The Parquet file at `path`, for the block to read. Raises PartGone if it is there no more, OutputError if it is
    damaged or not Parquet."""
    try:
        with open_columns(fs, path) as file, pq.ParquetFile(file) as part:
            yield part
    except FileNotFoundError as error:
        raise PartGone(f"{redact(path)} went away while it was read; run the command again.") from error
    except Exception as error:
        if not is_damage(error):
            raise
        said = one_line(str(error))
        raise OutputError(
            f"{redact(path)} is damaged, or not a Parquet file ({said}); `patchstream verify` says more."
        ) from error


def batches(fs: AbstractFileSystem, paths: Sequence[str], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Stream those of `columns` that a part has, in batches of at most `BATCH_ROWS` rows."""
    for path in paths:
        with open_part(fs, path) as part:
            present = [name for name in columns if name in part.schema_arrow.names]
            yield from part.iter_batches(batch_size=BATCH_ROWS, columns=present)
