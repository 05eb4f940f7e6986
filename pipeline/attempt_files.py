"""The files of attempts: how one is read, and what its status is by now."""

import socket
from collections.abc import Sequence
from datetime import datetime

from fsspec import AbstractFileSystem
from pydantic import ValidationError

from pipeline.processes import is_running, is_same, pid_namespace
from pipeline.storage import redact
from pipeline.store_errors import reading
from schemas.attempt import AttemptRecord
from schemas.errors import OutputError
from schemas.values import Shard


def read_attempt(fs: AbstractFileSystem, place: str) -> AttemptRecord | None:
    """The record of an attempt; None where there is none, or not yet what belongs in it.

    Raises OutputError when the file is not ours, or the store does not let us look.
    """
    try:
        with reading(place):
            content = fs.cat_file(place)
        return AttemptRecord.model_validate_json(content) if content else None
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise OutputError(
            f"{redact(place)} is not the record of an attempt ({str(error).splitlines()[0]}); if no job "
            "runs there, remove it: parts do not depend on it"
        ) from error


def as_known(records: Sequence[AttemptRecord]) -> list[AttemptRecord]:
    """The records, oldest first, but `died` or `taken over` in place of a `running` that is known to be over: its
    process is gone from this machine, or a later attempt works on its rows."""
    found = []
    for position, record in enumerate(records):
        if record.status == "running":
            later = any(shares_rows(record, other) for other in records[position + 1 :])
            if is_here(record) and not is_alive(record):
                record = record.model_copy(update={"status": "died"})
            elif later:
                record = record.model_copy(update={"status": "taken over"})
        found.append(record)
    return found


def shares_rows(record: AttemptRecord, other: AttemptRecord | Shard) -> bool:
    """Whether two shards, [i/n, (i+1)/n) each, share rows; in whole numbers, so that equal borders do not."""
    index, count = (other.index, other.count) if isinstance(other, Shard) else (other.shard_index, other.shard_count)
    mine = index * record.shard_count, (index + 1) * record.shard_count
    theirs = record.shard_index * count, (record.shard_index + 1) * count
    return mine[0] < theirs[1] and theirs[0] < mine[1]


def is_here(record: AttemptRecord) -> bool:
    """Whether its process is, or was, one of those that can be seen from here: of this host, and of this container."""
    return record.host == socket.gethostname() and record.pid_namespace in {None, pid_namespace()}


def is_alive(record: AttemptRecord) -> bool:
    """Whether the process that opened the attempt still runs here, and is not a later one of the same number."""
    if record.process is not None:
        return is_same(record.pid, record.process)
    return is_running(record.pid, datetime.fromisoformat(record.started).timestamp() + 1)
