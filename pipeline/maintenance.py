"""What can be done with a run's directory after, or between, its attempts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.attempt_files import as_known
from pipeline.opening import open_directory, reopen, resolve_job
from pipeline.record import require_record
from pipeline.sinks import attempts, compaction, intervals
from pipeline.sinks.intervals import Spans
from pipeline.sinks.ledger import Ledger, read_ledger, settled_ledger
from pipeline.sinks.parts import Part, read_part
from pipeline.sinks.verify import Verification
from pipeline.sinks.verify import verify as verify_parts
from pipeline.sources.manifest import check_parts
from pipeline.storage import Options, filesystem, redact
from schemas.errors import OutputError
from schemas.machines import Machines
from schemas.run import RunRecord
from schemas.spec import JobSpec, build_spec
from schemas.values import WHOLE


class NothingToRetry(OutputError):
    """No failed row qualifies and none is pending. Nothing was changed."""


_NONE: Mapping[str, Any] = MappingProxyType({})


def status(out: str, storage_options: Options) -> dict[str, Any]:
    """Counts of a run as JSON-ready values. Raises OutputError when `out` holds no run, or half-rewritten parts."""
    record = require_record(out, storage_options)
    opened = reopen(out, record, storage_options)
    ledger = settled_ledger(out, storage_options)
    left = opened.pending(ledger)
    # Until a run has come to its end, old versions stand in the parts as well.
    old_images, old_failures = (intervals.common(rows, opened.replaced) for rows in (ledger.images, ledger.failures))
    tried = as_known(attempts.read_attempts(out, storage_options))
    return {
        "out": redact(out),
        "run_id": record.run_id,
        "model": record.model.name,
        "dtype": record.model.dtype,
        "manifest_rows": record.manifest_rows,
        "replaced": intervals.count(opened.replaced),
        "images": intervals.count(ledger.images) - intervals.count(old_images),
        "failures": intervals.count(ledger.failures) - intervals.count(old_failures),
        "failures_by_cause": _causes(out, ledger, old_failures, storage_options),
        "pending": intervals.count(left),
        "parts": len(ledger.parts),
        "bytes": sum(part.size for part in ledger.parts),
        "attempts": [attempt.model_dump(mode="json") for attempt in tried],
    }


def verify(out: str, storage_options: Options) -> Verification:
    """Re-read every part, those of the manifest too, and hold the directory against its manifest."""
    record = require_record(out, storage_options)
    opened = reopen(out, record, storage_options)
    damaged = check_parts(out, opened.parts, storage_options)
    found = verify_parts(out, record, opened.replaced, opened.schema, storage_options)
    return found._replace(problems=damaged + found.problems)


def compact(out: str, target_bytes: int, storage_options: Options, *, force: bool = False) -> int:
    """Merge small parts; returns how many went into larger ones.

    Raises OutputError while a run is writing there; with `force` a run on another machine is taken for dead.
    """
    require_record(out, storage_options)
    with _attempt(out, "compact", storage_options, force=force):
        return compaction.compact(out, target_bytes, storage_options)


def reopen_failures(
    out: str,
    everything: bool,
    storage_options: Options,
    changes: Mapping[str, Any] = _NONE,
    *,
    force: bool = False,
    connect: Callable[[JobSpec], Machines] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Make failed rows pending again (the retryable ones, or all), by taking them out of `failures/`.

    `changes`: values of the spec that differ from those of the run: how hard it is tried, and where. `connect` gives
    the machines, and is called only if there is something to do; without it nobody looks for any. Returns how many
    rows, and the values of the spec that runs them. Should that run be cut short, they simply stay pending. Raises
    NothingToRetry when no row qualifies, OutputError while a run is writing there (as `compact`) and for what `apply`
    wrote, and, with nothing taken out, whatever would keep such a run from beginning: SpecError, CheckpointError,
    OutputError or ClusterError.
    """
    record = require_record(out, storage_options)
    _require_failures_of_its_own(out, record)
    values = {**_changed(_same_again(record), changes), "out": out, "storage_options": dict(storage_options)}
    spec = build_spec(values)  # wrong options are wrong where nothing is to be done as well
    compaction.recover(out, storage_options)  # in the midst of a swap rows are out of sight
    ledger = read_ledger(out, storage_options)
    rows = [_failed_rows(out, part, everything, storage_options) for part in _failures(ledger)]
    opened = reopen(out, record, storage_options)
    again = intervals.common(intervals.union(intervals.from_rows(found) for found in rows), opened.current)
    left = opened.pending(ledger)
    if not len(again) and not len(left):
        count = opened.count(ledger.failures)
        raise NothingToRetry(
            f"{redact(out)}: none of its {count:,} failures is worth another try as it stands (a 404 or a broken "
            "file stays one); use --all to try them regardless"
            if count
            else f"{redact(out)} has no failures, there is nothing to retry"
        )
    resolved = resolve_job(spec)
    open_directory(resolved)
    if connect:
        from pipeline.predicting import placement_of  # here, because it loads Ray, and the other commands need none

        attempts.require_free(out, WHOLE, storage_options, "retry", take_over=force)  # before machines are waited for
        placement_of(resolved, connect(spec), intervals.count(intervals.union([again, left])))
    # Also where nothing is taken out: the run that follows would end one that is still at work.
    with _attempt(out, "retry", storage_options, force=force):
        if len(again):
            compaction.remove_rows(out, "failures", again, storage_options)
    return intervals.count(again), values


def _require_failures_of_its_own(out: str, record: RunRecord) -> None:
    if record.applied:
        raise OutputError(
            f"{redact(out)}: `apply` labelled the rows of run {record.applied.run_id} here, and its failures are those "
            f"of that run: retry that run, then `patchstream apply DIR --probe {record.applied.probe} --out …` as "
            "before takes up what it gained"
        )


@contextmanager
def _attempt(out: str, command: str, storage_options: Options, *, force: bool) -> Iterator[None]:
    """The block as an attempt of its own at all rows."""
    _, attempt = attempts.claim(out, WHOLE, storage_options, command, take_over=force)
    attempt.status = "failed"
    try:
        yield
        attempt.status = "done"
    finally:
        attempts.finish(out, attempt, storage_options)


def _same_again(record: RunRecord) -> dict[str, Any]:
    """The values of a spec that computes what `record` says: a branch may have moved on, its commit has not."""
    model = {"model": record.model.name, "revision": record.model.revision, "dtype": record.model.dtype}
    backend = {"backend": "null"} if record.model.family == "null" else {}
    return {**record.spec, **model, **backend}


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `values`; one level down, only what they name. Without the back end of a server, no server."""
    changed = dict(values)
    for key, value in changes.items():
        changed[key] = {**(values.get(key) or {}), **value} if isinstance(value, Mapping) else value
    if changed.get("backend") != "triton" and "triton" not in changes:
        changed["triton"] = None
    return changed


def _failures(ledger: Ledger) -> list[Part]:
    return [part for part in ledger.parts if part.folder == "failures"]


def _failed_rows(out: str, part: Part, everything: bool, storage_options: Options) -> Any:
    fs, path = filesystem(out, storage_options)
    table = read_part(fs, path, part, ["row", "retryable"], out=out)
    return table["row"].to_numpy() if everything else table.filter(table["retryable"])["row"].to_numpy()


def _causes(out: str, ledger: Ledger, stale: Spans, storage_options: Options) -> dict[str, int]:
    """Failures by error name, the most frequent first; those of `stale` rows do not count."""
    fs, path = filesystem(out, storage_options)
    counts: dict[str, int] = {}
    for part in _failures(ledger):
        table = read_part(fs, path, part, ["row", "error"], out=out)
        current = ~intervals.contains(stale, table["row"].to_numpy())
        found = pc.value_counts(table["error"].filter(pa.array(current)))
        for entry in found.to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
