"""A look at the parts of a run while nobody rewrites them: in the middle of a swap some rows are out of sight."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from fsspec import AbstractFileSystem

from pipeline.storage import exists, join, redact
from schemas.errors import OutputError
from schemas.tables import SWAP_PLAN

T = TypeVar("T")

# For how long a rewrite of parts is waited for, and how often it is looked whether it has ended.
_SWAP_S = 10.0
_LOOK_S = 0.2


def until_settled(out: str) -> Iterator[None]:
    """Another look each time, while parts of `out` are being rewritten. Raises OutputError where that does not end."""
    for _ in range(1 + round(_SWAP_S / _LOOK_S)):
        yield
        time.sleep(_LOOK_S)
    raise OutputError(
        f"parts of {redact(out)} are being rewritten, and some of their rows cannot be seen meanwhile: wait for the "
        "command at work there. If there is none, it was cut short, and `patchstream compact DIR` finishes what it "
        "began"
    )


def settled_listing(out: str, fs: AbstractFileSystem, root: str, listed: Callable[[], list[T]]) -> Iterator[list[T]]:
    """What `listed` gives of the parts of `out` (`root` on `fs`) while none are being rewritten; again, later, for one
    who could not use it. Raises as `until_settled`, which names `out`."""
    for _ in until_settled(out):
        before = listed()
        if not exists(fs, join(root, SWAP_PLAN)):
            found = listed()
            # A swap that began since the look for its plan would have taken parts away. More parts may well have come.
            if set(before).issubset(found):
                yield found
