"""`attempts/*.json`: one file for each time somebody ran the command on a directory.

The newest attempt of a shard is the one that may write; an older one that is still alive somewhere finds out
before it makes a part visible, and stops. At its end an attempt writes what it did and how long it took.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

# Of a shorter run the rate is that over its whole time, start-up included.
_LEAST_RUN_S = 2.0
AttemptDevice = Literal["cpu", "gpu", "triton"]
# The last two are said of a record that still has `running`; no attempt writes them of itself.
AttemptStatus = Literal["running", "done", "interrupted", "failed", "died", "taken over"]


class StageSeconds(BaseModel):
    """Seconds of work by stage, summed over all workers (so they can exceed the wall clock)."""

    model_config = ConfigDict(extra="ignore")  # of a later version, whose directories stay readable

    fetch: float = 0.0
    decode: float = 0.0
    predict: float = 0.0
    write: float = 0.0


class Distance(BaseModel):
    """Cosine of the features in `dtype` to those in float32, over `images` of the run's own; of none where all rows
    that were tried failed."""

    model_config = ConfigDict(extra="ignore")  # as above

    dtype: str
    images: int
    median: float | None = None
    least: float | None = None


class AttemptRecord(BaseModel):
    """One attempt. Times are ISO 8601 in UTC.

    `startup_s` ends with the first finished batch; `images_per_s` is the rate from the first one of every
    call to the last.
    """

    model_config = ConfigDict(extra="ignore")  # as above

    attempt: int
    shard_index: int
    shard_count: int
    started: str
    host: str
    pid: int
    # Boot id and start tick (`process_mark`): tells it from a later process with the same pid.
    process: str | None = None
    # What `pid` counts in: containers of one machine may have one host name.
    pid_namespace: str | None = None
    versions: dict[str, str] = {}  # as in run.json, of the one who ran it
    status: AttemptStatus = "running"
    ended: str | None = None
    command: str = "embed"
    rows_planned: int = 0
    images: int = 0
    failures: int = 0
    parts: int = 0
    startup_s: float | None = None
    wall_s: float | None = None
    images_per_s: float | None = None
    stage_seconds: StageSeconds = StageSeconds()
    actors: int | None = None
    device: AttemptDevice | None = None  # what the model ran on
    decode_tasks: int | None = None  # one for each core that `images_per_s` took; None where that is not known
    bottleneck: str | None = None
    message: str | None = None
    distance: Distance | None = None  # for the 8-bit precisions

    @property
    def has_rate(self) -> bool:
        """Whether it ran for long enough behind its start-up for `images_per_s` to say something of a longer run."""
        if self.wall_s is None or self.startup_s is None:
            return False
        return self.wall_s - self.startup_s >= _LEAST_RUN_S
