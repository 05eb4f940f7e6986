"""What keeps us from reading or writing a file, in words: what it is, why, and what to do."""

import contextlib
import errno
from collections.abc import Iterator

from schemas.errors import OutputError, PatchstreamError
from schemas.redaction import named, redact

# Answers of web servers and stores that may be others the next time: also those of proxies in front of a server (520 to
# 530), but not the two that say what it never does.
TRANSIENT_STATUS = frozenset({408, 425, 429, *range(500, 600)} - {501, 505})
# What a disk of this machine says that has no room; no store answers so.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# By name, along the class hierarchy, what botocore and google-auth raise where there are no credentials that hold: the
# drivers need not be installed.
NO_CREDENTIALS = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}
    | {"ProfileNotFound", "GoogleAuthError"}
)
# Of google-auth, whose errors are all of the last kind: no answer from those who give out tokens.
_NO_ANSWER = frozenset({"TransportError", "TimeoutError"})
_ELSEWHERE = "choose another --out"
_CAUSES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the quota is used up; free some space",
    errno.EFBIG: "the file is larger than the limit for files here; raise it, or lower the size of a part",
    errno.EROFS: f"the file system is read-only; {_ELSEWHERE}",
    errno.EACCES: "writing there is denied; check the permissions and the credentials",
    errno.EPERM: "writing there is denied; check the permissions and the credentials",
    errno.ENOENT: "the folder or bucket does not exist (any more)",
    errno.ENOTDIR: f"a file stands where a folder is needed; {_ELSEWHERE}",
    errno.EEXIST: f"a file stands where a folder is needed; {_ELSEWHERE}",
    errno.EISDIR: f"a folder stands where the file should go; {_ELSEWHERE}",
    errno.EBUSY: "the store kept asking to slow down; go on later, or with a lower fetch.concurrency",
}


def lacks_credentials(error: BaseException) -> bool:
    """Whether there are no credentials that hold; the most derived class that is known decides."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return next((name for name in names if name in NO_CREDENTIALS | _NO_ANSWER), "") in NO_CREDENTIALS


def write_error(path: str, error: Exception, *, resumable: bool = True) -> OutputError:
    """An OutputError that names the path, the cause, and, of a run, what stays."""
    cause = _CAUSES.get(error_number(error), "")
    message = redact(str(error)) or type(error).__name__
    detail = f"{cause} ({message})" if cause else f"{type(error).__name__}: {message}"
    # In another folder there is nothing to go on from.
    goes_on = resumable and not cause.endswith(_ELSEWHERE)
    stays = ". What was committed stays; the same command goes on from there." if goes_on else ""
    return OutputError(f"cannot write {redact(path)}: {detail}{stays}")


def read_error(path: str, error: Exception) -> OutputError:
    """An OutputError for what keeps us from reading a file of a run: no credentials, no such endpoint, no rights."""
    return OutputError(
        f"cannot read {redact(path)}: {named(error)}. Check the address, the endpoint and the "
        "credentials (environment, profile or --storage-options)"
    )


def manifest_error(place: str, error: Exception) -> OutputError:
    """For what keeps us from reading a part of a run's manifest, be it for a while or for good."""
    return OutputError(
        f"cannot read {redact(place)}, of the run's manifest ({named(error)}). What was committed "
        "stays; once it can be read again, the same command goes on from there. If it is damaged or lost, no command "
        "makes it anew: put back a copy of it, or start a new --out"
    )


@contextlib.contextmanager
def reading(place: str) -> Iterator[str]:
    """`read_error` for whatever keeps us from reading `place`, unless it is not there."""
    try:
        yield place
    except (FileNotFoundError, PatchstreamError):
        raise
    except Exception as error:  # each driver has errors of its own, not all of them an OSError
        raise read_error(place, error) from error


def error_number(error: Exception) -> int:
    """The `errno` of an error, also of those that the drivers of object stores raise without one; 0 for none."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number
    # gcsfs: a plain OSError for 403, and its own HttpError with the status in `code` for 401.
    denied = str(error).startswith("Forbidden") or getattr(error, "code", None) in {401, "401"}
    if denied or isinstance(error, PermissionError):
        return errno.EACCES
    return errno.ENOENT if isinstance(error, FileNotFoundError) else 0
