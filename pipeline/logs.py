"""One line of JSON for each event in a worker: when, what, in which run, for which rows.

Ray keeps what a worker writes to standard error in the session's `worker-*.err`, where a log collector finds it.
"""

import json
import logging
import os
import socket
import sys
from datetime import UTC, datetime
from typing import Any

_log = logging.getLogger("pipeline")
# What this process works on now. A worker does one thing at a time, and threads that it starts do it with it.
_now: dict[str, Any] = {}


def working_on(run_id: str, stage: str, first: int | None = None, last: int | None = None) -> None:
    """From here on, every line of this worker names the run, the stage and the rows `first` to `last`."""
    if not any(isinstance(handler.formatter, _Json) for handler in _log.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Json())
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
        _log.propagate = False
    _now.clear()
    _now.update(run_id=run_id, stage=stage)
    if first is not None:
        _now.update(first_row=int(first), last_row=int(first if last is None else last))


def event(name: str, **facts: Any) -> None:
    """Write one line. `facts` must be JSON-ready and hold no address with credentials."""
    _log.info(name, extra={"facts": facts})


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
