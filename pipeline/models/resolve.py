"""From what the user calls a model to a folder on this machine.

    a folder, file:///folder    used where it lies
    s3://bucket/models/vit      downloaded once into the cache, under a name that changes when the files do;
    https://host/B_16.npz       so is a single weight file, with its config, or its vocabulary, beside it
    google/vit-base-patch16-224 through huggingface_hub, in its own cache; HF_HUB_OFFLINE is honoured

The cache of object-store checkpoints is `storage.cache_folder()`.
"""

import errno
import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem

from pipeline.addresses import lasting, scheme
from pipeline.models.hub import SMALL_FILES, TEXT_FILES, from_hub, nowhere
from pipeline.models.tokenizing import NAMES
from pipeline.models.weights import WEIGHT_SUFFIXES, is_weight_file, refuse_several
from pipeline.storage import cache_folder, exists, filesystem, redact
from pipeline.store_errors import NO_ROOM
from schemas.errors import CheckpointError
from schemas.redaction import named

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What says that a file has changed: of S3, GCS, disks and HTTP; of Azure, the hub, WebHDFS, FTP and memory.
_VERSION_KEYS = (
    *("ETag", "etag", "mtime", "LastModified", "updated", "Last-Modified", "Content-MD5", "Digest"),
    *("last_modified", "blob_id", "xet_hash", "modificationTime", "modify", "created"),
)
# What a store never answers: it is our own disk that refuses.
_REFUSED = NO_ROOM | {errno.EROFS}


class Place(NamedTuple):
    """A checkpoint on this machine. `name` leads to it from any folder; `revision` is the commit of a hub model."""

    name: str
    folder: Path
    revision: str | None = None


def resolve(model: str, revision: str | None, storage_options: Mapping[str, Any]) -> Place:
    """Find `model` and bring it to this machine if need be.

    Raises CheckpointError for a folder that is not there, a prefix without files, an unknown hub model, or a hub
    that cannot be reached.
    """
    on_disk = "://" in model and scheme(model) == "file"
    path = Path(filesystem(model, {})[1] if on_disk else model).expanduser()
    if path.exists():
        return Place(lasting(str(path)), path.absolute())
    if "://" in model and not on_disk:
        return Place(redact(model), _download(model, storage_options))
    if on_disk or model.startswith(("/", ".", "~")) or not HUB_NAME.fullmatch(model):
        raise CheckpointError(nowhere(model))
    folder = from_hub(model, revision)
    return Place(model, folder, folder.name)


def _download(url: str, storage_options: Mapping[str, Any]) -> Path:
    """Copy the files under `url` into the cache, once for all processes of this machine: their folder there, or the
    file where `url` is one."""
    fs, prefix = filesystem(url, storage_options)
    one = _plain(prefix).endswith(WEIGHT_SUFFIXES)
    try:
        files = _one_file(fs, prefix) if one else _in_folder(fs, prefix)
    except Exception as error:
        # fsspec's HTTP says "not found" of everything, and why only in the cause, an aiohttp error with a status.
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
            raise CheckpointError(f"{redact(url)}: no such file") from None
        raise CheckpointError(f"{redact(url)}: cannot be read: {named(cause)}") from error
    if not files:
        raise CheckpointError(f"{redact(url)}: no checkpoint there; expected config.json and model.safetensors")
    if not one:
        refuse_several(map(_file_name, files), redact(url))
    try:
        folder = _fetch(fs, redact(url), files)
    except OSError as error:
        raise CheckpointError(
            f"{redact(url)}: cannot be kept in {cache_folder()}: {error.strerror or error}. Make room there and see "
            "that it can be written, or name another folder with PATCHSTREAM_CACHE"
        ) from error
    return folder / _file_name(prefix) if one else folder


def _fetch(fs: AbstractFileSystem, url: str, files: Mapping[str, Mapping[str, Any]]) -> Path:
    """The folder of the cache that holds these files. Raises OSError where it cannot be written."""
    folder = cache_folder() / "models" / _version(url, files)
    # Where nothing tells one version from another they are fetched anew, and the content gives the name.
    dated = all(map(_is_dated, files.values()))
    # Before the lock, which a cache that is filled but read-only has no room for.
    if dated and folder.exists():
        return folder
    with _locked(folder):
        if dated and folder.exists():
            return folder
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for path in files:
                _get_file(fs, path, partial / _file_name(path))
            if not dated:
                contents = {path.name: {"Digest": _digest(path)} for path in partial.iterdir()}
                folder = folder.with_name(_version(url, contents))
                if folder.exists():
                    return folder
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # it may have filled the disk
    return folder


def _get_file(fs: AbstractFileSystem, path: str, target: Path) -> None:
    try:
        fs.get_file(path, str(target))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _REFUSED:
            raise
        raise CheckpointError(f"{redact(path)}: cannot be read: {named(error)}") from error


def _in_folder(fs: AbstractFileSystem, prefix: str) -> dict[str, Any]:
    """Path → facts of what makes up a checkpoint under `prefix`."""
    listing = fs.find(prefix, maxdepth=1, detail=True)
    words = {f"{path.removesuffix('.npz')}.txt" for path in map(_plain, listing) if path.endswith(".npz")}
    found = {path: facts for path, facts in listing.items() if _wanted(_file_name(path)) or _plain(path) in words}
    return {path: facts if _is_dated(facts) else fs.info(path) for path, facts in found.items()}


def _one_file(fs: AbstractFileSystem, path: str) -> dict[str, Any]:
    """Path → facts of a weight file, and of what it needs that lies beside it: a config, or the vocabulary of a LiT."""
    folder, _, name = _plain(path).rpartition("/")
    query = path.removeprefix(_plain(path))
    stem, _, suffix = name.rpartition(".")
    own = (f"{stem}.txt", f"{stem}.model", *NAMES) if suffix == "npz" else SMALL_FILES
    found = {path: fs.info(path)}
    for other in dict.fromkeys((*own, *TEXT_FILES)):
        place = f"{folder}/{other}{query}"
        if exists(fs, place):
            found[place] = fs.info(place)
    return found


def _plain(path: str) -> str:
    """Without the query of a web address, such as its signature."""
    return path.partition("?")[0] if path.startswith(("http://", "https://")) else path


def _file_name(path: str) -> str:
    return _plain(path).rpartition("/")[2]


def _wanted(name: str) -> bool:
    return is_weight_file(name) or name.endswith((".json", ".model")) or name in TEXT_FILES


def _is_dated(facts: Mapping[str, Any]) -> bool:
    """Whether the store says of a file more than its size, so that another of the same size is told from it."""
    return any(facts.get(key) for key in _VERSION_KEYS)


def _version(url: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    """A folder name for these versions of the files: another etag, time or size gives another name."""
    keys = ("size", *_VERSION_KEYS)
    facts = {_file_name(path): [str(entry.get(key)) for key in keys] for path, entry in files.items()}
    return hashlib.sha256(json.dumps([url, facts], sort_keys=True).encode()).hexdigest()[:32]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock beside `folder`, so that the actors of one machine download once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
