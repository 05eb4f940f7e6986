"""What a person sees: one progress line on a terminal, plain lines elsewhere, a summary with the next command."""

import contextlib
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from jobs.output import emit, show_rows, with_options
from pipeline.progress import duration

if TYPE_CHECKING:
    from pipeline.flow import Summary
    from pipeline.progress import Progress
    from schemas.attempt import Distance

_PLAIN_EVERY_S = 10.0
_PHASES = {
    "model": "reading the model",
    "listing": "listing the sources",
    "starting": "starting the workers",
    "running": "",
    "finishing": "compacting the parts",
}


class Screen:
    """Shows progress on standard error: a live line on a terminal, a line now and then elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False, emoji=False)
        self._live = Live(console=self._console, refresh_per_second=5, transient=True)
        self._last = (0.0, "", "")

    def __enter__(self) -> "Screen":
        if self._is_live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_live:
            self._live.stop()

    @property
    def _is_live(self) -> bool:
        return self._console.is_terminal and not self._quiet

    def show(self, progress: "Progress") -> None:
        """Take a look at a running job."""
        if self._quiet:
            return
        if self._is_live:
            self._live.update(_line(progress))
            return
        shown, *before = self._last
        now = time.monotonic()
        if before != [progress.phase, progress.note] or (progress.phase == "running" and now - shown >= _PLAIN_EVERY_S):
            self._last = (now, progress.phase, progress.note)
            emit(_line(progress).plain, to_stderr=True)

    def warn(self, message: str) -> None:
        """A warning that ends nothing."""
        self._console.print(f"warning: {message}", style="yellow", soft_wrap=True, markup=False)


@contextlib.contextmanager
def native_messages_aside(verbose: bool) -> Iterator[None]:
    """Send what C++ code (Ray's core) writes to file descriptor 2 into a file, while Python keeps the terminal.

    Ray's core warns there about Ray Data's own actors, past every Python logger. Does nothing when `verbose`, or
    when standard error is not the process's own.
    """
    try:
        own = sys.stderr.fileno() == 2
    except (OSError, ValueError):
        own = False
    if verbose or not own:
        yield
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    before = sys.stderr
    with tempfile.TemporaryFile(prefix="patchstream-stderr-") as aside:
        os.dup2(aside.fileno(), 2)
        sys.stderr = os.fdopen(os.dup(terminal), "w", buffering=1, errors="backslashreplace")
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            sys.stderr = before
            os.close(terminal)


def _line(progress: "Progress") -> Text:
    if progress.phase != "running":
        return Text("  ·  ".join(filter(None, [f"… {_PHASES[progress.phase]}", progress.note])))
    share = progress.done / progress.total if progress.total else 1.0
    parts = [f"{progress.done:,}/{progress.total:,} ({share:.0%})", f"{progress.failures:,} failed"]
    if progress.left_s is not None:  # before, rates are those of the start-up
        parts.insert(1, f"{progress.rate_now:,.1f} images/s now, {progress.rate_mean:,.1f} on average")
    if progress.bottleneck:
        parts.append(f"held up by {progress.bottleneck}")
    if progress.left_s is not None:
        parts.append(f"{duration(progress.left_s)} left")
    if progress.note:
        parts.append(progress.note)
    return Text("  ·  ".join(parts))


def plain_summary(summary: "Summary", report: str | None, attention: str | None = None) -> dict[str, Any]:
    """The summary as JSON-ready values."""
    return {
        "out": summary.out,
        "rows": summary.rows,
        "images": summary.images,
        "failures": summary.failures,
        "report": report,
        **({"attention": attention} if attention else {}),
        "attempt": summary.attempt.model_dump(mode="json"),
    }


def print_summary(
    summary: "Summary",
    report: str | None,
    attention: str | None = None,
    storage_options: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """What was done, how fast, and what to type next. Nothing is read as markup and no path is cut.

    `storage_options` are those that `summary.out` is reached with."""
    show_rows(_summary_rows(summary, report, attention))
    out = shlex.quote(summary.out)
    query = "select uri, width, height from images limit 5"
    command = f"status {out}" if summary.failures else f'sql {out} "{query}"'
    told = with_options(f"patchstream {command}", storage_options)
    emit(typer.style(f"next: {told}", bold=True))


def _precision(off: "Distance") -> str:
    if not off.images:
        return f"{off.dtype}: not compared with float32: none of the sampled images gave features"
    distance = f"cosine to float32 {off.median:.5f} in the median, {off.least:.5f} at least"
    return f"{off.dtype}: {distance}, over {off.images} of these images"


def _summary_rows(summary: "Summary", report: str | None, attention: str | None) -> list[tuple[str, str]]:
    attempt = summary.attempt
    rows = [("images", f"{summary.images:,} of {summary.rows:,}"), ("failures", f"{summary.failures:,}")]
    if attempt.rows_planned and attempt.wall_s is not None:
        done = attempt.images + attempt.failures
        pace = f"{done:,} rows in {duration(attempt.wall_s)}"
        if attempt.has_rate:
            pace += f", {attempt.images_per_s or 0:,.1f}/s once all ran"
        work = attempt.stage_seconds.model_dump().items()
        rows.append(("this attempt", pace))
        rows.append(("work by stage", ", ".join(f"{name} {duration(value)}" for name, value in work)))
        if attempt.distance:
            rows.append(("precision", _precision(attempt.distance)))
    else:
        rows.append(("this attempt", "nothing was left to do"))
    from pipeline.addresses import join

    places = (("report", report), ("attention maps", attention))
    return [*rows, ("dataset", join(summary.out, "images/*.parquet")), *((name, at) for name, at in places if at)]
