"""The files of a run that one may see, and a look at its parts while nobody rewrites them: in the middle of a swap some
rows are out of sight."""

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fsspec import AbstractFileSystem

from pipeline.addresses import join
from pipeline.storage import exists, read_json, redact
from pipeline.store_errors import reading
from schemas.errors import OutputError
from schemas.tables import SWAP_PLAN

T = TypeVar("T")

# For how long a rewrite of parts is waited for, and how often it is looked whether it has ended.
_SWAP_S = 10.0
_LOOK_S = 0.2


def listing(fs: AbstractFileSystem, folder: str, *, detail: bool = False) -> list[Any]:
    """What `ls` finds directly under `folder` now, also where storage options ask for listings to be kept: a run
    changes. Raises what the store raises."""
    fs.invalidate_cache(folder)  # `refresh=True` is refused by drivers that keep nothing, such as SFTP's
    return list(fs.ls(folder, detail=detail))


def list_files(fs: AbstractFileSystem, folder: str, suffix: str) -> list[tuple[str, int]]:
    """Path and size of each visible file directly under `folder` that ends in `suffix`, by name; none where there is no
    such folder. Names that begin with a point or an underscore are hidden: writes under way.

    Raises OutputError where the store does not let us look.
    """
    with reading(folder):
        try:
            entries = listing(fs, folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
    # A link is neither "file" nor "directory".
    found = [(str(entry["name"]), int(entry["size"] or 0)) for entry in entries if entry["type"] != "directory"]
    return sorted(item for item in found if _is_visible(item[0].rpartition("/")[2], suffix))


def _is_visible(name: str, suffix: str) -> bool:
    return name.endswith(suffix) and not name.startswith((".", "_"))


def list_parquet(fs: AbstractFileSystem, folder: str) -> list[tuple[str, int]]:
    """Path and size of each visible Parquet file directly under `folder`, as `list_files`."""
    return list_files(fs, folder, ".parquet")


def is_same_run(fs: AbstractFileSystem, root: str, run_id: str) -> bool:
    """Whether the run in `root` is still the one of this id."""
    return bool((read_json(fs, join(root, "run.json")) or {}).get("run_id") == run_id)


def became_another(out: str) -> OutputError:
    """For a run in whose place another was put while it was read."""
    return OutputError(f"the run in {redact(out)} became another while it was read; run the command again")


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
        with reading(join(root, SWAP_PLAN)) as plan:
            under_way = exists(fs, plan)
        if not under_way:
            found = listed()
            # A swap that began since the look for its plan would have taken parts away. More parts may well have come.
            if set(before).issubset(found):
                yield found
