"""Headers that sign a GET of an S3 object: AWS Signature Version 4, for a request without body.

After https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html. A tenth of the time that
botocore's general signer takes; a test holds the two equal.
"""

import hashlib
import hmac
from datetime import UTC, datetime
from functools import lru_cache
from typing import Protocol
from urllib.parse import urlsplit

_NO_BODY = hashlib.sha256(b"").hexdigest()
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Credentials(Protocol):
    """Botocore's frozen credentials."""

    access_key: str
    secret_key: str
    token: str | None


def signed_headers(url: str, credentials: Credentials, region: str, now: datetime | None = None) -> dict[str, str]:
    """Headers to send with a GET of `url`, whose path is percent-encoded and which has no query."""
    moment = (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.port and parts.port != _DEFAULT_PORTS.get(parts.scheme):
        host = f"{host}:{parts.port}"
    headers = {"x-amz-content-sha256": _NO_BODY, "x-amz-date": moment}
    if credentials.token:
        headers["x-amz-security-token"] = credentials.token
    canonical = "".join(f"{name}:{value}\n" for name, value in {"host": host, **headers}.items())
    names = ";".join(["host", *headers])
    request = f"GET\n{parts.path}\n\n{canonical}\n{names}\n{_NO_BODY}"
    scope = f"{moment[:8]}/{region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = _signing_key(credentials.secret_key, moment[:8], region)
    signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    account = f"Credential={credentials.access_key}/{scope}"
    headers["Authorization"] = f"AWS4-HMAC-SHA256 {account}, SignedHeaders={names}, Signature={signature}"
    return headers


@lru_cache(maxsize=8)
def _signing_key(secret_key: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret_key}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key
