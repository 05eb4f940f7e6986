"""What a person wants to see while a job runs: counts, rates, time left, and which stage holds it up."""

import time
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

from pipeline.placement import Placement
from pipeline.staff import actors_on
from schemas.attempt import AttemptRecord, StageSeconds

Phase = Literal["model", "listing", "starting", "running", "finishing"]

_WINDOW_S = 15.0
_SILENT_S = 300.0
# Over less than this a rate is noise: small blocks that were finished one after the other arrive together.
_LEAST_S = 1.0
_COUNT_S = 5.0


def duration(seconds: float | None) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress(NamedTuple):
    """One look at a running job. Rows; images per second; seconds."""

    phase: Phase
    done: int = 0
    total: int = 0
    failures: int = 0
    committed: int = 0
    rate_now: float = 0.0
    rate_mean: float = 0.0
    left_s: float | None = None
    bottleneck: str | None = None
    note: str = ""


Listener = Callable[[Progress], None]
# Cores and GPUs that the cluster has at this moment.
Resources = Callable[[], tuple[float, float]]


class Meter:
    """Counts rows as they arrive and are committed, and turns the counts into rates."""

    def __init__(
        self,
        total: int,
        done: int,
        failures: int,
        placement: Placement,
        readers: int,
        resources: Resources | None = None,
        served: bool = False,
    ) -> None:
        """`readers` are the reads that each decoding task has under way at once; `resources` is for a cluster that may
        grow, and the placement that of its beginning. `served`: the actors wait for a server that computes."""
        self.total = total
        self.done = done
        self.failures = failures
        self.images = 0
        self.failed = 0
        self.parts = 0
        self.seconds = StageSeconds()
        # Seconds until the first rows arrived.
        self.startup_s: float | None = None
        self._before = done
        self._placement = placement
        self._readers = readers
        self._started = time.monotonic()
        self._blocks = 0
        self._heard = self._started
        self._resources = resources
        # Whether actors compute on the cores that decode.
        self._shares_cores = not placement.actor_gpus and not served
        self._counts = 0
        self._counted = float("-inf")
        self._cpus = self._gpus = 0.0
        self._base: tuple[float, int] | None = None
        self._recent: deque[tuple[float, int]] = deque([(self._started, done)])

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._started

    def _steady(self, until: float) -> float | None:
        if self._base and self.done > self._base[1] and until - self._base[0] >= _LEAST_S:
            return (self.done - self._base[1]) / (until - self._base[0])
        return None

    def _rate(self, until: float) -> float:
        """Images per second since every call gave its first rows; until a second later, over the whole time."""
        return self._steady(until) or (self.done - self._before) / max(time.monotonic() - self._started, 1e-9)

    def received(self, rows: int) -> None:
        """One block of `rows` arrived."""
        now = time.monotonic()
        self.done += rows
        self._heard = now
        self._blocks += 1
        if self.startup_s is None:
            self.startup_s = now - self._started
        # The first blocks of all calls were under way at once: those behind the first are not the work of an instant.
        if self._blocks <= self._placement.initial_actors * self._placement.actor_lanes:
            self._base = (now, self.done)
        self._recent.append((now, self.done))
        while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW_S:
            self._recent.popleft()

    def committed(self, images: int, failures: int, parts: int, seconds: StageSeconds) -> None:
        """Rows and parts of one write became visible; `seconds` is what the stages took for them."""
        self.images += images
        self.failed += failures
        self.failures += failures
        self.parts += parts
        for name in StageSeconds.model_fields:
            setattr(self.seconds, name, getattr(self.seconds, name) + getattr(seconds, name))

    def look(self) -> Progress:
        """Counts, rates and the time left, as of now."""
        now = time.monotonic()
        if self._resources and self._blocks and now - self._counted >= _COUNT_S:
            cpus, gpus = self._resources()
            self._cpus, self._gpus = self._cpus + cpus, self._gpus + gpus
            self._counts, self._counted = self._counts + 1, now
        since, count = self._recent[0]
        rate_now = (self.done - count) / max(now - since, 1e-9)
        steady = self._steady(now)
        return Progress(
            phase="running" if self._blocks else "starting",
            done=self.done,
            total=self.total,
            failures=self.failures,
            committed=self._before + self.images + self.failed,
            rate_now=rate_now,
            rate_mean=self._rate(now),
            # Before, it would be reckoned with the start-up in it.
            left_s=(self.total - self.done) / steady if steady else None,
            bottleneck=self.bottleneck(),
            note=self._silence(now),
        )

    def _silence(self, now: float) -> str:
        silent_s = now - self._heard
        return f"nothing has come for {silent_s / 60:.0f} minutes" if silent_s > _SILENT_S else ""

    def report(self, attempt: AttemptRecord) -> None:
        """Enter what was measured into the attempt's record."""
        attempt.images, attempt.failures, attempt.parts = self.images, self.failed, self.parts
        attempt.startup_s, attempt.wall_s = self.startup_s, self.wall_s
        # Up to the last rows: writing what is still held has another pace, which in a short job would count.
        attempt.images_per_s = self._rate(self._recent[-1][0])
        attempt.stage_seconds = self.seconds
        attempt.actors = self._placement.actors.max
        attempt.decode_tasks = self._cores(attempt.shard_count)
        attempt.bottleneck = self.bottleneck()

    def _cores(self, shards: int) -> int | None:
        """Those that gave the rate: of a cluster in the mean. Other shards may compute there too; then nobody knows."""
        if self._resources is None:
            return self._placement.decoders
        return round(self._cpus / self._counts) if self._counts and shards == 1 else None

    def bottleneck(self) -> str | None:
        """The stage that is busiest for what it has: predict by actors, decode by decoding tasks, fetch by reads."""
        wall = self.wall_s - (self.startup_s or 0.0)
        rows = self.images + self.failed
        if not rows or wall <= 0:
            return None
        actors, decoders = self._room()
        if self._shares_cores:
            # On CPUs everybody draws on the same cores: the larger share of the work is what to look at.
            shares = {"predict": self.seconds.predict, "decode": self.seconds.decode}
        else:
            shares = {"predict": self.seconds.predict / actors, "decode": self.seconds.decode / decoders}
        name = max(shares, key=lambda stage: shares[stage])
        fetching = self.seconds.fetch / (decoders * self._readers)
        working = sum(shares.values()) / decoders if self._shares_cores else max(shares.values())
        return "fetch" if fetching > working else name

    def _room(self) -> tuple[float, float]:
        """Actors and decoding tasks that there is room for, on a cluster that may grow in the mean over its counts."""
        actors, decoders = float(self._placement.actors.max), float(self._placement.decoders)
        if self._counts and not self._shares_cores:
            decoders = self._cpus / self._counts
        if self._counts and self._placement.actor_gpus:
            actors = min(actors, self._gpus / self._counts * actors_on(1, self._placement.actor_gpus))
        return max(actors, 1.0), max(decoders, 1.0)
