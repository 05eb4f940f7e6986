"""The run record: made once, compared ever after, so that a directory never mixes two computations."""

import importlib.metadata
import json
import logging
import platform
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from pydantic import ValidationError

from pipeline.addresses import absolute, join, lasting
from pipeline.lock import Held, locked
from pipeline.storage import Options, exists, filesystem, is_local, put_bytes, read_json, redact
from pipeline.store_errors import read_error, reading
from schemas.errors import OutputError
from schemas.release import VERSION
from schemas.run import ModelRecord, RunRecord, difference
from schemas.spec import PLACE_FIELDS, RECORDED_FIELDS, RESULT_FIELDS, JobSpec
from schemas.tables import FeatureSize

_RECORDED_VERSIONS = ("torch", "ray", "pyarrow", "pillow", "pi-heif", "simplejpeg", "numpy")
# Of these, what computes or stores: the others only carry it.
_OF_RESULTS = ("patchstream", "torch", "pillow", "pi-heif", "simplejpeg", "numpy")
# So many of the files in a directory that is not a run's are named.
_NAMED = 8
# What must agree between two runs on one directory; the rest of the model record follows from these.
_MODEL_IDENTITY = ("digest", "dtype", "pooled", "preprocessing", "label_digest", "zero_shot", "head")

log = logging.getLogger(__name__)


def read_record(out: str, storage_options: Options) -> RunRecord | None:
    """The record under `out`, or None where no run was ever started.

    Raises OutputError when the file is there but is not ours, or the store does not let us look.
    """
    fs, path = filesystem(out, storage_options)
    try:
        content = read_json(fs, join(path, "run.json"))
        return None if content is None else RunRecord.model_validate(content)
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OutputError(
            f"{redact(out)}/run.json is not a run record of this version ({str(error).splitlines()[0]}): "
            "give the directory of a run, or another --out"
        ) from error
    except Exception as error:  # each driver has errors of its own, not all of them an OSError
        raise read_error(join(out, "run.json"), error) from error


def require_record(out: str, storage_options: Options) -> RunRecord:
    """The record under `out`. Raises OutputError as `read_record` does, and when there is none."""
    record = read_record(out, storage_options)
    if record is not None:
        return record
    fs, path = filesystem(out, storage_options)
    held = ""
    with reading(out):
        if not exists(fs, path):
            raise OutputError(f"{redact(out)}: no such directory")
        if is_local(fs):  # a bucket's prefix may hold millions
            held = f" (it holds: {', '.join(_names(fs, path)[:_NAMED]) or 'nothing'})"
    raise OutputError(
        f"{redact(out)} is not the directory of a run: it has no run.json{held}. "
        "Give the --out of `patchstream embed` or `classify`"
    )


def new_record(spec: JobSpec, model: ModelRecord, feature_dims: dict[str, FeatureSize]) -> RunRecord:
    """A record with no manifest yet."""
    return RunRecord(
        run_id=uuid.uuid4().hex,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        spec=recorded_spec(spec),
        model=model,
        feature_dims=feature_dims,
        versions=current_versions(),
        manifest_rows=0,
        manifest_parts=[],
        base_parts=0,
    )


def recorded_spec(spec: JobSpec) -> dict[str, Any]:
    """The part of a spec that decides the result, where the files are that go with it, and how the run was carried out;
    without credentials."""
    values = spec.model_dump(mode="json", include=set(RECORDED_FIELDS), exclude={"triton": {"headers"}})
    for name in PLACE_FIELDS:
        if values[name] is not None:
            values[name] = redact(absolute(values[name]))
    values["sources"] = [redact(lasting(source)) for source in spec.sources]
    if spec.triton:
        values["triton"]["url"] = redact(spec.triton.url)
    return values


def check_same(record: RunRecord, wanted: RunRecord, out: str) -> None:
    """Raise OutputError with what differs if `wanted` is another computation than the one recorded."""
    lines = difference(_identity(record), _identity(wanted))
    if lines:
        raise OutputError(
            f"{redact(out)} holds another run, and one directory never mixes two:\n  "
            + "\n  ".join(lines)
            + "\nChoose another --out, or give the options of the run that is there"
        )


def warn_of_versions(record: RunRecord, now: Mapping[str, str]) -> None:
    """Tell whoever goes on with a run if the libraries that touch its results are not those that it began with."""
    changed = [
        f"{name} {record.versions[name]} → {now[name]}"
        for name in _OF_RESULTS
        if record.versions.get(name, now[name]) != now[name]
    ]
    if changed:
        log.warning(
            "this run began with other versions (%s): what is computed now may differ slightly from what is there, and "
            "`attempts/` says which attempt had which. For one set throughout, go on with the versions in run.json, or "
            "start anew in another --out",
            ", ".join(changed),
        )


def check_empty(out: str, storage_options: Options) -> None:
    """Raise OutputError if `out` has Parquet under images/ or failures/ but no record that explains it."""
    fs, path = filesystem(out, storage_options)
    for folder in ("images", "failures"):
        found = _names(fs, join(path, folder))
        if found:
            raise OutputError(
                f"{redact(out)}/{folder} already holds files ({found[0]}, …) but there is no run.json beside it; "
                "choose another --out, so that a glob over it does not mix them with this run"
            )


def write_record(out: str, record: RunRecord, storage_options: Options) -> None:
    """Make `record` the record of `out`; from here on its manifest counts."""
    fs, path = filesystem(out, storage_options)
    put_bytes(fs, join(path, "run.json"), record.model_dump_json(indent=1).encode())


@contextmanager
def freezing(out: str, storage_options: Options, *, again: bool = False) -> Iterator[Held | None]:
    """Let one of several jobs that start together freeze the inputs; the others wait until it has.

    Yields the lock to the one that must do it, and None to the others. With `again` there is a record already, and each
    job has its turn to add to it.
    """
    fs, path = filesystem(out, storage_options)
    lock = join(path, "_freezing")

    def frozen() -> bool:
        with reading(lock):
            return not again and read_record(out, storage_options) is not None and not exists(fs, lock)

    try:
        with locked(fs, lock, "listing the sources", unless=frozen) as mine:
            yield mine if again or read_record(out, storage_options) is None else None
    finally:
        if is_local(fs):
            with suppress(OSError):  # of a run that came to nothing, not even an empty folder stays
                Path(path).rmdir()


def _identity(record: RunRecord) -> dict[str, Any]:
    model = record.model.model_dump(mode="json")
    spec = {name: value for name, value in record.spec.items() if name in RESULT_FIELDS}
    # Earlier versions recorded them as they were typed: those are read from here.
    spec["sources"] = [lasting(source) for source in spec.get("sources", ())]
    return {"spec": spec, "model": {name: model[name] for name in _MODEL_IDENTITY}}


def current_versions() -> dict[str, str]:
    """Versions of what takes part, by name."""
    versions = {"python": platform.python_version(), "patchstream": VERSION}
    for name in _RECORDED_VERSIONS:
        versions[name] = importlib.metadata.version(name)
    return versions


def _names(fs: AbstractFileSystem, folder: str) -> list[str]:
    try:
        names = [str(name).rpartition("/")[2] for name in fs.ls(folder, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if name and not name.startswith("."))
