"""One way to reach a file, whatever the scheme: fsspec, with credentials the ecosystem's way.

`storage_options` is either flat (`{"anon": true}`: for every remote scheme) or keyed by scheme
(`{"s3": {...}, "gs": {...}}`). Endpoints and credentials otherwise come from the environment and the profiles that
s3fs, gcsfs and aiohttp read themselves.
"""

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from pipeline.addresses import ALIASES, NO_CHAINS, is_chained, scheme, small_scheme
from pipeline.signals import uninterrupted
from pipeline.store_errors import write_error
from pipeline.web_options import web_options, with_basic_auth
from schemas.errors import PatchstreamError, SourceError, SpecError
from schemas.redaction import named
from schemas.redaction import redact as redact

Options = Mapping[str, Any]

# Their drivers answer from listings that they keep, unless told not to.
_LISTINGS_KEPT = frozenset({"s3", "gs", "abfs", "abfss", "az"})
# As long as botocore waits, unless told otherwise.
_SILENT_S = 60.0


def options_for(url: str, storage_options: Options) -> dict[str, Any]:
    """The part of `storage_options` that concerns the scheme of `url`.

    Raises SpecError where schemes and plain options stand side by side: it would be a guess whom the latter concern.
    """
    name = scheme(url)
    known = set(fsspec.available_protocols())
    # A flat option may hold a dict too (`client_kwargs`), so the keys tell the two forms apart, not the values.
    by_scheme = {key: value for key, value in storage_options.items() if key in known and isinstance(value, dict)}
    if not by_scheme:
        return {} if name == "file" else web_options(storage_options) if name == "http" else dict(storage_options)
    if len(by_scheme) < len(storage_options):
        loose = ", ".join(sorted(set(storage_options) - set(by_scheme)))
        raise SpecError(
            f"storage options are keyed by scheme ({', '.join(sorted(by_scheme))}), but these are not: {loose}; "
            "put each under the scheme it is for"
        )
    options = dict({ALIASES.get(key, key): value for key, value in by_scheme.items()}.get(name, {}))
    return with_basic_auth(options) if name == "http" else options


def filesystem(url: str, storage_options: Options) -> tuple[AbstractFileSystem, str]:
    """The file system that serves `url`, and the path of `url` on it.

    Raises SourceError where it cannot be opened: a scheme that fsspec does not know, a driver that is not installed, or
    credentials that a driver asks for at once and does not get.
    """
    try:
        return open_filesystem(url, storage_options)
    except PatchstreamError:
        raise
    except Exception as error:  # noqa: BLE001  each driver has errors of its own
        # Not chained: what the driver says may hold the token that it tried.
        raise SourceError(
            f"{redact(url)}: cannot be opened ({named(error)}). Check the credentials (environment, "
            "profile or --storage-options) and the endpoint"
        ) from None


def open_filesystem(url: str, storage_options: Options) -> tuple[AbstractFileSystem, str]:
    """As `filesystem`, but for one who judges the driver's own errors: they come as they are, beside SourceError where
    no driver serves `url`, and SpecError as `options_for` raises it. Listings are never cached: a bucket changes while
    a job runs. Instances are cached by fsspec for each process.
    """
    url = small_scheme(url)
    options = _uncached(url, storage_options)
    if is_chained(url):  # fsspec wants those of what lies behind the first store by name
        # A cache on the way (`zip://a.png::simplecache::s3://…`) stands there by its name alone.
        parts = [f"{part}://" if part in storage_options else part for part in url.split("::")[1:]]
        options |= {str(get_protocol(part)): _uncached(part, storage_options) for part in parts if "://" in part}
    try:
        with uninterrupted():  # the first time this imports the driver
            fsspec.get_filesystem_class(get_protocol(url))
        if scheme(url) in NO_CHAINS and "::" in url:
            fs, _ = fsspec.core.url_to_fs(url.partition("::")[0], **options)
            return fs, str(fs._strip_protocol(url))
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise SourceError(f"{redact(url)}: no file system for this address ({redact(str(error))})") from None
    return fs, str(path)


def _uncached(url: str, storage_options: Options) -> dict[str, Any]:
    kind = scheme(url)
    ours: dict[str, Any] = {"use_listings_cache": False} if kind in _LISTINGS_KEPT else {}
    if kind == "gs":
        ours["requests_timeout"] = _gcs_timeout()
    return ours | options_for(url, storage_options)


def _gcs_timeout() -> Any:
    """gcsfs by itself waits for ever where a connection has fallen silent; with this it tries again, as botocore does.

    Not a limit on the whole: a large checkpoint may take its time.
    """
    with uninterrupted():
        import aiohttp  # here, because the driver alone needs it
    return aiohttp.ClientTimeout(total=None, sock_connect=_SILENT_S, sock_read=_SILENT_S)


def is_local(fs: AbstractFileSystem) -> bool:
    """Whether paths of `fs` are paths of this machine."""
    return isinstance(fs, LocalFileSystem)


def cache_folder() -> Path:
    """Where this user keeps what was fetched: `$PATCHSTREAM_CACHE`, else `patchstream` in `$XDG_CACHE_HOME` or
    `~/.cache`."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("PATCHSTREAM_CACHE") or f"{user}/patchstream").expanduser()


def put_bytes(fs: AbstractFileSystem, path: str, data: bytes) -> None:
    """Write a file that appears whole or not at all, over whatever stood there.

    An object store makes a single put visible when it is complete; on a disk the data goes to a hidden name first
    and is renamed. Raises OutputError naming the path when the place is full, gone or denied.
    """
    try:
        if not is_local(fs):
            fs.pipe_file(path, data)
            return
        with _written_beside(path, data) as temporary:
            os.replace(temporary, path)
    except Exception as error:
        raise write_error(_address(fs, path), error) from error


def create_bytes(fs: AbstractFileSystem, path: str, data: bytes) -> bool:
    """Write a file, whole, only if it does not exist yet. False if somebody else was first.

    Atomic on a disk (a hard link is refused where the name is taken), S3 (`If-None-Match`) and Google Cloud Storage
    (`ifGenerationMatch`). A put whose answer got lost is sent again by the client and then finds its own object:
    False means "it is there now", so read it before taking it for another's. Raises OutputError as `put_bytes` does.
    """
    try:
        if is_local(fs):
            return _create_local(path, data)
        return _create_remote(fs, path, data)
    except Exception as error:
        raise write_error(_address(fs, path), error) from error


def _address(fs: AbstractFileSystem, path: str) -> str:
    """The path as people name it: fsspec's own lack the scheme."""
    return path if is_local(fs) else str(fs.unstrip_protocol(path))


@contextlib.contextmanager
def _written_beside(path: str, data: bytes) -> Iterator[str]:
    """The data in a hidden file of the same folder, safe on the disk, gone at the end."""
    folder, _, name = path.rpartition("/")
    os.makedirs(folder or "/", exist_ok=True)
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


# FAT, some network file systems and buckets mounted as folders.
_NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP}


def _create_local(path: str, data: bytes) -> bool:
    with _written_beside(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
        else:
            return True
    try:
        # Exclusive here as well, but a reader may see the file before its data.
        with open(path, "xb") as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                os.unlink(path)  # what is half there would be taken for somebody else's
                raise
    except FileExistsError:
        return False
    return True


def _create_remote(fs: AbstractFileSystem, path: str, data: bytes, attempts: int = 5) -> bool:
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        code = _store_code(error)
        if code in {"PreconditionFailed", "412"}:
            return False
        # S3: another conditional write was under way; whether it succeeded shows in the next attempt.
        if code == "ConditionalRequestConflict" and attempts > 1:
            return _create_remote(fs, path, data, attempts - 1)
        raise
    return True


def _store_code(error: BaseException) -> str:
    """The error code that an S3 endpoint answered with; empty where there is none."""
    response = getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def exists(fs: AbstractFileSystem, path: str) -> bool:
    """Whether something is at `path`. Raises what the store raises.

    The `exists` of most fsspec drivers, that of disks among them, takes any error for "no": one that a moment's outage
    raises, and the one by which a signal ends the process.
    """
    try:
        fs.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def remove(fs: AbstractFileSystem, path: str, *, recursive: bool = False) -> None:
    """Remove a file, or a folder with all in it, unless it is gone already. Raises what the store raises.

    A request whose answer got lost is sent again by the client; Google Cloud Storage then says that nothing is there.
    """
    with contextlib.suppress(FileNotFoundError):
        if recursive:
            fs.rm(path, recursive=True)
        else:
            fs.rm_file(path)


def read_json(fs: AbstractFileSystem, path: str) -> Any:
    """The JSON document at `path`, or None where there is none."""
    try:
        return json.loads(fs.cat_file(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
