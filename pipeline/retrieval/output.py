"""Writing results: each appears whole or not at all, on a disk and on an object store.

A result NAME is a folder and files beside it, such as `clusters/NAME/` and `clusters/NAME.json`. It is written under a
hidden name first, and takes the place of an earlier one of its name when all of it is there.
"""

import errno
import itertools
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from pipeline.addresses import join
from pipeline.storage import exists, is_local, put_bytes, remove
from pipeline.store_errors import write_error
from schemas.errors import SpecError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# What some result or other has beside its folder.
_BESIDE = (".json", ".centres.npy", ".delete.txt", ".svg")
_UNFINISHED = re.compile(r"\..+-(\d+)-[0-9a-f]{8}")
ABANDONED_S = 24 * 3600.0


def check_name(name: str) -> str:
    """`name` if it can be a folder's name on every store. Raises SpecError otherwise."""
    if not _NAME.fullmatch(name):
        raise SpecError(f"--name {name!r}: use letters, digits, `.`, `_` and `-`, beginning with a letter or digit")
    return name


@contextmanager
def staged(fs: AbstractFileSystem, path: str) -> Iterator[Path]:
    """A local file to write; it becomes `path` when the block ends well, and vanishes when it does not.

    Raises OutputError naming the path when the place is full, gone or denied.
    """
    folder, _, name = path.rpartition("/")
    try:
        if is_local(fs):
            Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".staged-", dir=folder if is_local(fs) else None) as temporary:
            local = Path(temporary, name)
            yield local
            if is_local(fs):
                local.replace(path)
            else:
                fs.put_file(str(local), path)
    except OSError as error:
        raise write_error(path, error, resumable=False) from error


def write_table(fs: AbstractFileSystem, path: str, table: pa.Table) -> None:
    """`table` as one Parquet file at `path`."""
    with staged(fs, path) as local:
        pq.write_table(table, local, compression="zstd")


def write_json(fs: AbstractFileSystem, path: str, content: dict[str, Any]) -> None:
    """`content` as indented JSON; NaN is refused, since it is not JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    put_bytes(fs, path, (text + "\n").encode())


@contextmanager
def replacing(fs: AbstractFileSystem, home: str, name: str) -> Iterator[str]:
    """A hidden folder to write a result to, laid out as `home`: a folder `name`, and `name.json` and others beside it.

    When the block ends well they take the place of an earlier result of that name, of which nothing is left. When it
    does not, they vanish and the earlier result stays. Raises OutputError if the place cannot be written.
    """
    staging = join(home, f".{name}-{int(time.time())}-{uuid.uuid4().hex[:8]}")
    try:
        yield staging
        try:
            _put_in_place(fs, staging, home, name)
        except OSError as error:
            raise write_error(join(home, name), error, resumable=False) from error
    finally:
        # What cannot be removed now goes with a later command.
        with suppress(Exception):
            _remove_folder(fs, staging)
            _remove_abandoned(fs, home)


def _put_in_place(fs: AbstractFileSystem, staging: str, home: str, name: str) -> None:
    fresh, beside = _below(fs, staging), [name + ending for ending in _BESIDE]
    old = [file for file in beside if exists(fs, join(home, file))]
    if not is_local(fs):
        old += [join(name, file) for file in _below(fs, join(home, name))]
    # The record goes first and comes last: without it `list_results` and `index.load` take the rest for no result.
    # The old files go before the new ones come, so that a swap that is cut short leaves no two halves.
    for file in sorted(old, key=_is_record, reverse=True):
        remove(fs, join(home, file))  # another command of this name may have been faster
    if is_local(fs):
        _swap_folders(Path(staging), name, Path(home, name))
        fresh = [file for file in fresh if file in beside]
    for file in sorted(fresh, key=_is_record):
        if is_local(fs):
            os.replace(join(staging, file), join(home, file))
        else:
            fs.cp_file(join(staging, file), join(home, file))


def _below(fs: AbstractFileSystem, folder: str) -> list[str]:
    return [str(path).removeprefix(folder).strip("/") for path in fs.find(folder)]


def _is_record(file: str) -> bool:
    return file.endswith(".json")


def _swap_folders(staging: Path, name: str, folder: Path) -> None:
    """Rename the new folder to the place of the old one, again where another command of this name was faster."""
    for number in itertools.count():
        aside = staging / f"replaced-{number}"
        try:
            with suppress(FileNotFoundError):
                folder.rename(aside)
            (staging / name).rename(folder)
        except BaseException as error:
            if not folder.exists() and aside.exists():
                aside.rename(folder)
            if not isinstance(error, OSError) or error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
        else:
            return


def _remove_folder(fs: AbstractFileSystem, folder: str) -> None:
    if is_local(fs):
        shutil.rmtree(folder, ignore_errors=True)
    elif exists(fs, folder):
        fs.rm(folder, recursive=True)


def _remove_abandoned(fs: AbstractFileSystem, home: str) -> None:
    """Delete what commands that were killed left in `home`. One that began today may still be at work."""
    for path in fs.ls(home, detail=False):
        begun = _UNFINISHED.fullmatch(str(path).rstrip("/").rpartition("/")[2])
        if begun and time.time() - int(begun[1]) > ABANDONED_S:
            _remove_folder(fs, str(path))


def list_folders(fs: AbstractFileSystem, folder: str) -> list[str]:
    """Names of the visible folders under `folder`, sorted; none where it does not exist."""
    try:
        entries = fs.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = [str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]
    return sorted(name for name in names if _NAME.fullmatch(name))


def place(root: str, kind: str, name: str) -> str:
    """`root/kind/name`, with the name checked."""
    return join(root, kind, check_name(name))
