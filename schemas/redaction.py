"""What must not be printed or stored: credentials in addresses and in storage options."""

import json
import re
from typing import Any

# Here what stands in front of the `@` is a container (Azure) or a bucket (Oracle), and nobody logs in with the address.
_CONTAINER_SCHEMES = ("abfs", "abfss", "az", "wasb", "wasbs", "oci", "ocilake")
# Where a user and a password may stand; also in the middle of a chained URL or of a message.
LOGIN_PLACE = "(?<=://)" + "".join(rf"(?<!\b{scheme}://)" for scheme in _CONTAINER_SCHEMES)
_USER = re.compile(LOGIN_PLACE + r"[^/?#\s]*@")
# How libraries tell of a request without its host: `… exceeded with url: /path?…`, `GET /path?… HTTP/1.1`.
_REQUEST = re.compile(r"(?:\burl:|\b(?:GET|HEAD|POST|PUT|PATCH|DELETE)) /[^\s?]*\?")
_PARAMETER = re.compile(r"(?<=[?&;#])([^=?&;#\s]+=)[^&;#\s'\"<>]+")
# Names that sign a request on S3 (v2, v4), Google Cloud Storage (v2, v4), Azure (SAS) and CloudFront, and common ones.
_SECRET_NAME = re.compile(
    r"signature|token|secret|credential|passw|accesskeyid|accessid|accountkey|apikey|key-pair-id"
    r"|(?:^|[-_.])(?:sig|key|pwd|auth|jwt|policy|expires)=",
    re.IGNORECASE,
)
_SECRET_KEY = re.compile(
    r"key|secret|token|passw|passphrase|pwd|credential|auth|cookie|headers|connection|sas"
    r"|signature(?!_)|(?<![a-z])(?:sig|pass)(?![a-z_])",  # but `signature_version`
    re.IGNORECASE,
)
# Ways to come by credentials that drivers know by name, and no credential themselves.
_WAYS = ("anon", "google_default", "cloud", "cache", "browser", True, False, None)


def redact(text: str) -> str:
    """`text` without user, password and the values of signed query parameters in the URLs it holds.

    `text` is a URL or a message with URLs or requests in it; what is neither stays as it is. Safe to print and
    to store.
    """
    if "://" not in text and not _REQUEST.search(text):
        return text
    return _PARAMETER.sub(_redact_parameter, _USER.sub("", text))


def one_line(text: str) -> str:
    """`text` on one line, without what `redact` takes out of it."""
    return redact(" ".join(text.split()))


def named(error: BaseException) -> str:
    """The kind of an error and, where it says something, its message, on one line and without credentials."""
    message = one_line(str(error))
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _redact_parameter(match: re.Match[str]) -> str:
    return f"{match[1]}…" if _SECRET_NAME.search(match[1]) else match[0]


def holds_secret(text: str) -> bool:
    """Whether storage options, as JSON, hold a credential: in an address, or under a key, at any depth, that
    credentials stand under."""

    def below(node: Any) -> bool:
        if isinstance(node, dict):
            return any((_SECRET_KEY.search(key) and value not in _WAYS) or below(value) for key, value in node.items())
        return isinstance(node, list) and any(below(item) for item in node)

    if redact(text) != text:
        return True
    try:
        return below(json.loads(text))
    except json.JSONDecodeError:
        return bool(_SECRET_KEY.search(text))
