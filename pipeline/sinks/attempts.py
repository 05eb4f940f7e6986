"""Who may write a directory: `attempts/NNNNNN.json`, created exclusively, the newest wins.

A driver that was killed can leave workers behind that finish a write seconds later. They ask the fence first, and
a newer attempt on overlapping rows turns them away. Between that question and the write lie milliseconds, on an object
store seconds, which a new attempt waits out before it reads what is done.
"""

import os
import socket
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime

from fsspec import AbstractFileSystem

from pipeline.addresses import join
from pipeline.attempt_files import as_known, is_alive, is_here, read_attempt, shares_rows
from pipeline.processes import pid_namespace, process_mark
from pipeline.record import current_versions
from pipeline.settled import listing
from pipeline.storage import Options, create_bytes, filesystem, is_local, put_bytes, redact
from pipeline.store_errors import reading
from schemas.attempt import AttemptRecord
from schemas.errors import OutputError
from schemas.values import Shard

_SETTLE_S = 1.0
_SETTLE_REMOTE_S = 5.0
# Clocks of two machines may differ by some of it.
_LATELY_S = 60.0
# Run again, these are refused on account of their own dead attempt.
_NOT_TAKING_OVER = frozenset({"compact", "retry"})


class Fence:
    """Says whether this attempt is still the newest for its rows. Picklable; travels with every write."""

    def __init__(self, out: str, record: AttemptRecord, shard: Shard, storage_options: Options) -> None:
        self.out = out
        self.number = record.attempt
        self.shard = shard
        self.storage_options = dict(storage_options)
        self._harmless = self.number
        self._maker = _maker(record)

    def check(self) -> None:
        """Raise OutputError if a newer attempt works on the same rows, if the directory is not the one of ours, or if
        that cannot be read."""
        fs, path = filesystem(self.out, self.storage_options)
        _require_own(fs, path, self.number, self._maker)
        all_read = True
        for newer in sorted(_numbers(fs, path)):
            if newer <= self._harmless:
                continue
            record = _read(fs, path, newer)
            if record is None:
                # Just being made, so not yet writing, or left empty by a kill; a later check may see it whole.
                all_read = False
                continue
            if shares_rows(record, self.shard):
                raise OutputError(
                    f"{redact(self.out)}: attempt {newer} (process {record.pid} on {record.host}) has taken over "
                    f"from attempt {self.number}, which therefore stops. Only one may write the same rows"
                )
            if all_read:
                self._harmless = newer


def require_free(
    out: str, shard: Shard, storage_options: Options, command: str, *, take_over: bool = True
) -> list[AttemptRecord]:
    """The records of the attempts there, as they are known.

    Raises OutputError if an attempt on overlapping rows is alive on this machine, or, without `take_over`, if one on
    another machine or in another container has not said that it ended: whether it lives cannot be seen from here. There
    one that a later attempt has taken over from holds up nobody: its fence turns it away.
    """
    records = read_attempts(out, storage_options)
    known = as_known(records)
    for record, settled in zip(records, known, strict=True):
        if record.status != "running" or not shares_rows(record, shard):
            continue
        here = is_here(record)
        if here and record.pid != os.getpid() and is_alive(record):
            raise OutputError(
                f"{redact(out)}: process {record.pid} has been writing there since {record.started}. "
                "Wait for it or stop it first; two runs must not write the same rows"
            )
        if not here and settled.status == "running" and not take_over:
            again = "" if record.command in _NOT_TAKING_OVER else "run its own command again or "
            host = f"{record.host}, in another container" if record.host == socket.gethostname() else record.host
            raise OutputError(
                f"{redact(out)}: attempt {record.attempt} (process {record.pid} on {host}) has been running "
                f"since {record.started}, and `{command}` would end it. Wait for it; if it is dead, {again}give "
                "--force"
            )
    return known


def claim(
    out: str, shard: Shard, storage_options: Options, command: str, *, take_over: bool = True
) -> tuple[Fence, AttemptRecord]:
    """Open a new attempt on the rows of `shard`. Raises OutputError as `require_free` does."""
    fs, path = filesystem(out, storage_options)
    records = require_free(out, shard, storage_options, command, take_over=take_over)
    unfinished = any(
        _may_have_left_writes(record, records[position + 1 :])
        for position, record in enumerate(records)
        if shares_rows(record, shard)
    )
    record = _open(fs, path, shard, command)
    if unfinished:
        try:
            time.sleep(_SETTLE_S if is_local(fs) else _SETTLE_REMOTE_S)
        except BaseException:  # a signal; the caller has no record yet that it could end
            record.status = "interrupted"
            finish(out, record, storage_options)
            raise
    return Fence(out, record, shard, storage_options), record


def _open(fs: AbstractFileSystem, path: str, shard: Shard, command: str) -> AttemptRecord:
    """A new attempt under the first number that is free."""
    number = max(_numbers(fs, path), default=0)
    while True:
        number += 1
        record = AttemptRecord(
            attempt=number,
            shard_index=shard.index,
            shard_count=shard.count,
            started=_now(),
            host=socket.gethostname(),
            pid=os.getpid(),
            process=process_mark(os.getpid()),
            pid_namespace=pid_namespace(),
            versions=current_versions(),
            command=command,
        )
        created = create_bytes(fs, _path(path, number), record.model_dump_json(indent=1).encode())
        # It may be ours although we were refused: the answer to a first try was lost.
        if created or _read(fs, path, number) == record:
            return record


def finish(out: str, record: AttemptRecord, storage_options: Options) -> None:
    """The attempt is over. Raises OutputError as `note` does, unless it failed or was interrupted: where the place is
    out of reach, to note that fails as well, and must not hide what came first."""
    record.ended = _now()
    with suppress(OutputError) if record.status in {"failed", "interrupted"} else nullcontext():
        note(out, record, storage_options)


def note(out: str, record: AttemptRecord, storage_options: Options) -> None:
    """Write what the attempt did over the file that opened it.

    Raises OutputError where that is gone or another's, or where the store does not let us look or write.
    """
    fs, path = filesystem(out, storage_options)
    _require_own(fs, path, record.attempt, _maker(record))
    put_bytes(fs, _path(path, record.attempt), record.model_dump_json(indent=1).encode())


def read_attempts(out: str, storage_options: Options) -> list[AttemptRecord]:
    """Every attempt so far, oldest first."""
    fs, path = filesystem(out, storage_options)
    records = (_read(fs, path, number) for number in sorted(_numbers(fs, path)))
    return [record for record in records if record is not None]


def _maker(record: AttemptRecord) -> tuple[str, str, int]:
    return record.started, record.host, record.pid


def _require_own(fs: AbstractFileSystem, path: str, number: int, maker: tuple[str, str, int]) -> None:
    """Numbers begin anew where somebody deletes a directory and starts another run in it."""
    record = _read(fs, path, number)
    if record is None or _maker(record) != maker:
        raise OutputError(
            f"{redact(path)}: attempt {number} is no longer that of this job (process {maker[2]} on {maker[1]}), which "
            "therefore stops: the directory was deleted or begun anew while it ran"
        )


def _may_have_left_writes(record: AttemptRecord, later: Sequence[AttemptRecord]) -> bool:
    """Whether writes that passed the fence may still be under way: of one that was killed or stopped, unless it ended,
    or one of the `later` attempts closed the fence to it, more than a minute ago."""
    if record.status == "done":
        return False
    closed = [other.started for other in later if shares_rows(record, other)]
    return all(_is_lately(time) for time in (record.ended, *closed) if time)


def _is_lately(moment: str) -> bool:
    return abs((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()) < _LATELY_S


def _numbers(fs: AbstractFileSystem, path: str) -> list[int]:
    try:
        with reading(join(path, "attempts")) as folder:
            names = listing(fs, folder)
    except FileNotFoundError:
        return []
    stems = [name.rpartition("/")[2].removesuffix(".json") for name in names]
    return [int(stem) for stem in stems if stem.isdigit()]


def _read(fs: AbstractFileSystem, path: str, number: int) -> AttemptRecord | None:
    return read_attempt(fs, _path(path, number))


def _path(path: str, number: int) -> str:
    return join(path, "attempts", f"{number:06d}.json")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
