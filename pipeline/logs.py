"""One line of JSON for each event in a worker: when, what, in which run, for which rows.

Ray keeps what a worker writes to standard error in the session's `worker-*.err`, where a log collector finds it.
"""

import json
import logging
import os
import socket
import sys
import threading
from datetime import UTC, datetime
from typing import Any

_log = logging.getLogger("pipeline")
# What this process works on now: one thing at a time, in which threads that it starts share. Of an actor with several
# calls at once it is the latest one.
_now: dict[str, Any] = {}
# Sources are listed in several threads.
_telling = threading.Lock()
_told: set[tuple[str, ...]] = set()


def working_on(run_id: str, stage: str, first: int | None = None, last: int | None = None) -> None:
    """From here on, every line of this worker names the run, the stage and the rows `first` to `last`."""
    if not any(isinstance(handler.formatter, _Json) for handler in _log.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Json())
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
        _log.propagate = False
    global _now  # replaced whole, for another thread may be writing a line
    rows = {} if first is None else {"first_row": int(first), "last_row": int(first if last is None else last)}
    _now = {"run_id": run_id, "stage": stage, **rows}


def event(name: str, **facts: Any) -> None:
    """Write one line. `facts` must be JSON-ready and hold no address with credentials."""
    _log.info(name, extra={"facts": facts})


def warn_once(log: logging.Logger, key: tuple[str, ...], message: str, *values: object) -> None:
    """Not for every table or shard of a data set."""
    with _telling:
        if key not in _told:
            _told.add(key)
            log.warning(message, *values)


class _Json(logging.Formatter):
    """Also what other modules of the pipeline warn of comes out in this form."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **_now,
            **getattr(record, "facts", {}),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
