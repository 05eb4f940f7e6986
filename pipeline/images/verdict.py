"""What an exception from a file system means for an image: its name, whether to try again now, and later.

Drivers raise many classes for few causes, and some are installed only with their driver, so they are told apart by
status code, `errno` and class name. Nothing that reaches a message holds a credential.
"""

import errno
import re
from dataclasses import dataclass
from typing import Any

from pipeline.storage import redact
from pipeline.store_errors import NO_CREDENTIALS, TRANSIENT_STATUS
from schemas.errors import ImageError
from schemas.redaction import one_line


class HttpStatusError(Exception):
    """An answer other than the file. `retry_after_s` is what the server asked for, if it did."""

    def __init__(self, status: int, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"HTTP {status} {reason}".strip())
        self.status = status
        self.retry_after_s = retry_after_s


class TokenRefusedError(Exception):
    """Google Cloud Storage answered 401: no token, or one that is over. An object that is out of reach is a 403."""


class TruncatedBodyError(Exception):
    """The body ended before the length that its header promised."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`again`: worth another try at once. `retryable`: the `retry` command may succeed. `wait_s`: asked for by the
    server."""

    error: str
    again: bool
    retryable: bool
    wait_s: float | None = None


_NOT_FOUND = Verdict("NotFound", again=False, retryable=False)
_FORBIDDEN = Verdict("Forbidden", again=False, retryable=False)
_NO_CREDENTIALS = Verdict("NoCredentials", again=False, retryable=True)
# Google's answer to a token that is just over, or not yet known everywhere: the next try may bring another.
_TOKEN_REFUSED = Verdict("NoCredentials", again=True, retryable=True)
_BAD_ADDRESS = Verdict("BadAddress", again=False, retryable=False)
_TIMED_OUT = Verdict("TimedOut", again=True, retryable=True)
_CONNECTION = Verdict("ConnectionFailed", again=True, retryable=True)
_TRUNCATED = Verdict("TruncatedBody", again=True, retryable=True)
_NOT_A_FILE = Verdict("NotAFile", again=False, retryable=False)
_IO = Verdict("StorageError", again=True, retryable=True)
_UNREADABLE = Verdict("ServerError", again=True, retryable=True)

_NAMED_STATUS = dict.fromkeys(TRANSIENT_STATUS, "ServerError") | {408: "TimedOut", 429: "Throttled", 503: "Throttled"}

# S3 gives these with 400 or 403, though the object is as good as ever: new credentials, or a clock that was set, and it
# is read. The third is of the service that gives out tokens.
_CREDENTIAL_CODES = frozenset(
    {"ExpiredToken", "InvalidToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestTimeTooSkewed"}
)

# Looked up along the class hierarchy, most derived class first.
_BY_CLASS_NAME = {
    "FileNotFoundError": _NOT_FOUND,
    "PermissionError": _FORBIDDEN,
    "IsADirectoryError": _NOT_A_FILE,
    "NotADirectoryError": _NOT_FOUND,
    "TimeoutError": _TIMED_OUT,
    "FSTimeoutError": _TIMED_OUT,
    "ServerTimeoutError": _TIMED_OUT,
    "ConnectTimeoutError": _TIMED_OUT,
    "ReadTimeoutError": _TIMED_OUT,
    "Timeout": _TIMED_OUT,
    "TruncatedBodyError": _TRUNCATED,
    "ClientPayloadError": _TRUNCATED,
    "ContentLengthError": _TRUNCATED,
    "IncompleteRead": _TRUNCATED,
    "IncompleteReadError": _TRUNCATED,
    "ResponseStreamingError": _TRUNCATED,
    **dict.fromkeys(NO_CREDENTIALS, _NO_CREDENTIALS),
    "TokenRefusedError": _TOKEN_REFUSED,
    "InvalidURL": _BAD_ADDRESS,
    "NonHttpUrlClientError": _BAD_ADDRESS,
    "TooManyRedirects": _BAD_ADDRESS,
    "ParamValidationError": _BAD_ADDRESS,
    "ClientSSLError": Verdict("ConnectionFailed", again=False, retryable=True),
    "ClientConnectionError": _CONNECTION,
    "ServerDisconnectedError": _CONNECTION,
    "ConnectionError": _CONNECTION,
    "HTTPClientError": _CONNECTION,
    "TransportError": _CONNECTION,
    "ResponseParserError": _UNREADABLE,
}

_TRANSIENT_ERRNO = frozenset(
    {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.EREMOTEIO}
    | {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EMFILE, errno.ENFILE, errno.EPROTO}
)
_BY_ERRNO = {errno.ENAMETOOLONG: _BAD_ADDRESS, errno.ELOOP: _NOT_FOUND, errno.ENXIO: _NOT_A_FILE}


def changed(url: str) -> ImageError:
    """The error of a row whose place is in a container that is not what it was."""
    message = f"{redact(url)} has changed since it was listed; --update takes up what it holds now"
    return ImageError("fetch", "Changed", message)


def in_pieces(url: str, name: str) -> ImageError:
    """The error of a member of a tar that was packed as a sparse file, without its holes."""
    message = f"{name} is a sparse file in {redact(url)}, not one range of bytes; pack it anew without `tar --sparse`"
    return ImageError("fetch", "SparseMember", message)


def judge(error: BaseException) -> Verdict:
    """The verdict on an exception that an attempt to read raised."""
    error = _reason(error)
    if _response(error).get("Error", {}).get("Code") in _CREDENTIAL_CODES:
        return _NO_CREDENTIALS
    status, wait_s = answered(error)
    if status is not None:
        return _judge_status(status, wait_s)
    if isinstance(error, OSError) and error.errno in _BY_ERRNO:
        return _BY_ERRNO[error.errno]
    for kind in type(error).__mro__:
        if kind.__name__ in _BY_CLASS_NAME:
            return _BY_CLASS_NAME[kind.__name__]
    # To an answer that it cannot parse aiohttp gives a status of its own, 400; to any other the server's.
    if any(kind.__name__ == "HttpProcessingError" for kind in type(error.__cause__).__mro__):
        return _UNREADABLE
    status = _whole(getattr(error, "status", None) or getattr(error, "code", None))
    if status == 401 and type(error).__module__.partition(".")[0] == "gcsfs":
        return _TOKEN_REFUSED
    if status is not None and 400 <= status < 600:
        return _judge_status(status, None)
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return _IO
    return Verdict(type(error).__name__, again=False, retryable=True)


def _reason(error: BaseException) -> BaseException:
    """fsspec calls whatever goes wrong as it looks at a URL a missing file, with the reason behind it. A TypeError is
    that of an option which the driver does not take."""
    inner = error.__cause__
    if not isinstance(error, FileNotFoundError) or inner is None:
        return error
    from_web = any(kind.__module__.partition(".")[0] == "aiohttp" for kind in type(inner).__mro__)
    return inner if from_web or isinstance(inner, TimeoutError | TypeError) else error


def _judge_status(status: int, wait_s: float | None) -> Verdict:
    if status in {404, 410}:
        return _NOT_FOUND
    if status in {401, 403, 407}:
        return _FORBIDDEN
    if status in _NAMED_STATUS:
        return Verdict(_NAMED_STATUS[status], again=True, retryable=True, wait_s=wait_s)
    return Verdict(f"Http{status}", again=False, retryable=status >= 500)


def answered(error: BaseException) -> tuple[int | None, float | None]:
    """HTTP status and Retry-After behind an exception of ours or of botocore, which s3fs wraps into an OSError."""
    for link in (error, error.__cause__):
        if isinstance(link, HttpStatusError):
            return link.status, link.retry_after_s
    metadata = _response(error).get("ResponseMetadata", {})
    headers = metadata.get("HTTPHeaders", {})
    return _whole(metadata.get("HTTPStatusCode")), retry_after_s(headers.get("retry-after"))


def _response(error: BaseException) -> dict[str, Any]:
    """What botocore made of an answer; empty where there is none."""
    for link in (error, error.__cause__):
        response = getattr(link, "response", None)
        if isinstance(response, dict) and "ResponseMetadata" in response:
            return response
    return {}


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int) or (isinstance(value, str) and value.isdigit()) else None


def retry_after_s(header: str | None) -> float | None:
    """Seconds of a Retry-After header. Its form as a date is taken for no wish: clocks differ."""
    return float(header) if header is not None and re.fullmatch(r"\d{1,6}", header.strip()) else None


def scrub(text: str) -> str:
    """`text` on one line, cut to 300 characters, every address in it without credentials."""
    return one_line(text)[:300]


def fetch_failure(url: str, error: BaseException, verdict: Verdict, attempts: int) -> ImageError:
    """The row for an image that could not be read."""
    reason = _reason(error)
    cause = scrub(str(reason)) or type(reason).__name__
    message = f"{redact(url)}: {cause}"
    if verdict.wait_s:
        message += f" (the server asks to wait {verdict.wait_s:g} s)"
    return ImageError("fetch", verdict.error, message, retryable=verdict.retryable, attempts=attempts)


def too_many_bytes(url: str, size: int, max_bytes: int) -> ImageError:
    """The row for a file that is larger than the user allows."""
    message = f"{redact(url)}: at least {size:,} bytes; the limit is {max_bytes:,} (fetch.max_bytes)"
    return ImageError("fetch", "TooManyBytes", message)


def bad_address(url: str, error: Exception) -> ImageError:
    """The row for an address that no request can be made of."""
    return ImageError("fetch", "BadAddress", f"{redact(url)}: {scrub(str(error))}; correct the address")
