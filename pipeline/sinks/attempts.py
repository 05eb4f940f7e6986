"""Who may write a directory: `attempts/NNNNNN.json`, created exclusively, the newest wins.

A driver that was killed can leave workers behind that finish a write seconds later. They ask the fence first, and
a newer attempt on overlapping rows turns them away. Between that question and the write lie milliseconds, which
a new attempt waits out before it reads what is done.
"""

import os
import socket
import time
from datetime import UTC, datetime

from fsspec import AbstractFileSystem

from pipeline.storage import Options, create_bytes, filesystem, join, put_bytes, redact
from schemas.attempt import AttemptRecord
from schemas.errors import OutputError
from schemas.spec import Shard

_SETTLE_S = 1.0


class Fence:
    """Says whether this attempt is still the newest for its rows. Picklable; travels with every write."""

    def __init__(self, out: str, number: int, shard: Shard, storage_options: Options) -> None:
        self.out = out
        self.number = number
        self.shard = shard
        self.storage_options = dict(storage_options)
        self._harmless = number

    def check(self) -> None:
        """Raise OutputError if a newer attempt works on the same rows."""
        fs, path = filesystem(self.out, self.storage_options)
        for newer in _numbers(fs, path):
            if newer <= self._harmless:
                continue
            record = _read(fs, path, newer)
            if record is not None and _overlap(record, self.shard):
                raise OutputError(
                    f"{redact(self.out)}: attempt {newer} (process {record.pid} on {record.host}) has taken over "
                    f"from attempt {self.number}, which therefore stops. Only one may write the same rows"
                )
            self._harmless = newer


def claim(
    out: str, shard: Shard, storage_options: Options, command: str, *, take_over: bool = True
) -> tuple[Fence, AttemptRecord]:
    """Open a new attempt on the rows of `shard`.

    Raises OutputError if an attempt on overlapping rows is alive on this machine, or, without `take_over`, if one on
    another machine has not said that it ended: whether it lives cannot be seen from here.
    """
    fs, path = filesystem(out, storage_options)
    unfinished = False
    for record in read_attempts(out, storage_options):
        if record.status == "running" and _overlap(record, shard):
            unfinished = True
            if record.host == socket.gethostname() and record.pid != os.getpid() and _alive(record):
                raise OutputError(
                    f"{redact(out)}: process {record.pid} has been writing there since {record.started}. "
                    "Wait for it or stop it first; two runs must not write the same rows"
                )
            if record.host != socket.gethostname() and not take_over:
                raise OutputError(
                    f"{redact(out)}: attempt {record.attempt} (process {record.pid} on {record.host}) has been running "
                    f"since {record.started}, and `{command}` would end it. Wait for it; if it is dead, run its own "
                    "command again or give --force"
                )
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
            command=command,
        )
        if create_bytes(fs, _path(path, number), record.model_dump_json(indent=1).encode()):
            break
    if unfinished:
        time.sleep(_SETTLE_S)
    return Fence(out, number, shard, storage_options), record


def finish(out: str, record: AttemptRecord, storage_options: Options) -> None:
    """Write what the attempt did over the file that opened it."""
    fs, path = filesystem(out, storage_options)
    record.ended = _now()
    put_bytes(fs, _path(path, record.attempt), record.model_dump_json(indent=1).encode())


def read_attempts(out: str, storage_options: Options) -> list[AttemptRecord]:
    """Every attempt so far, oldest first."""
    fs, path = filesystem(out, storage_options)
    records = (_read(fs, path, number) for number in sorted(_numbers(fs, path)))
    return [record for record in records if record is not None]


def _numbers(fs: AbstractFileSystem, path: str) -> list[int]:
    try:
        names = fs.ls(join(path, "attempts"), detail=False, refresh=True)
    except FileNotFoundError:
        return []
    stems = [name.rpartition("/")[2].removesuffix(".json") for name in names]
    return [int(stem) for stem in stems if stem.isdigit()]


def _read(fs: AbstractFileSystem, path: str, number: int) -> AttemptRecord | None:
    try:
        content = fs.cat_file(_path(path, number))
    except FileNotFoundError:
        return None
    return AttemptRecord.model_validate_json(content) if content else None


def _path(path: str, number: int) -> str:
    return join(path, "attempts", f"{number:06d}.json")


def _overlap(record: AttemptRecord, shard: Shard) -> bool:
    """Whether two shards, [i/n, (i+1)/n) each, share rows; in whole numbers, so that equal borders do not."""
    mine = shard.index * record.shard_count, (shard.index + 1) * record.shard_count
    theirs = record.shard_index * shard.count, (record.shard_index + 1) * shard.count
    return mine[0] < theirs[1] and theirs[0] < mine[1]


def _alive(record: AttemptRecord) -> bool:
    """Whether the process that opened the attempt still runs, and is not a later one with the same number."""
    try:
        os.kill(record.pid, 0)
        started = os.stat(f"/proc/{record.pid}").st_ctime
    except ProcessLookupError:
        return False
    except (PermissionError, FileNotFoundError):
        return True
    return started <= datetime.fromisoformat(record.started).timestamp() + 1


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
