"""The exception tree.

    PatchstreamError            exit code 2: wrong usage, spec, checkpoint or place; nothing was lost
    ├── SpecError               a spec or an option breaks a rule
    ├── SourceError             a source matches nothing, cannot be listed or is no such table
    ├── CheckpointError         a model cannot be found, read, or is of another family
    ├── OutputError             the output directory holds another run, or cannot be written
    ├── ClusterError            the machines asked for do not exist, or fail for good
    ├── TooManyFailures         exit code 3: more images failed than the user allows
    └── Interrupted             exit code 130 or 143: stopped by a signal; the same command resumes

    ImageError                  one image; becomes a row of `failures/`, never ends a run

A message says what was given, which rule it broke and what to do about it.
"""

from typing import Literal

Stage = Literal["fetch", "decode", "predict"]


class PatchstreamError(Exception):
    """Base of every error that ends a command."""

    exit_code = 2


class SpecError(PatchstreamError):
    """A spec or an option breaks a rule."""


class SourceError(PatchstreamError):
    """A source matches nothing, cannot be listed, or is not the table it was taken for."""


class CheckpointError(PatchstreamError):
    """A model cannot be found or read, or its tensors do not fit the family its config names."""


class OutputError(PatchstreamError):
    """An output directory belongs to another run, or a part cannot be written."""


class ClusterError(PatchstreamError):
    """Ray cannot be reached, or the cluster lacks what was asked for or loses what it gave."""


class TooManyFailures(PatchstreamError):
    """More images failed than `--max-failure-rate` allows; every row is accounted for all the same."""

    exit_code = 3


class Interrupted(PatchstreamError):
    """A signal stopped the run; what was committed stays and the same command resumes."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class ImageError(Exception):
    """One image failed. Carries what a row of `failures/` records.

    `error` is a short stable name to group by (`NotFound`, `Truncated`, `TooManyPixels`, …);
    `retryable` says whether the same bytes at the same place may succeed later.
    """

    def __init__(self, stage: Stage, error: str, message: str, *, retryable: bool = False, attempts: int = 1) -> None:
        super().__init__(message)
        self.stage: Stage = stage
        self.error = error
        self.message = message
        self.retryable = retryable
        self.attempts = attempts

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_image_error, (self.stage, self.error, self.message, self.retryable, self.attempts)


def _rebuild_image_error(stage: Stage, error: str, message: str, retryable: bool, attempts: int) -> ImageError:
    return ImageError(stage, error, message, retryable=retryable, attempts=attempts)
