"""A real S3 endpoint on a free loopback port."""

import contextlib
import http.client
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from support.processes import serving

_KEY = "patchstream"
_SECRET = "not-a-secret"
_REGION = "us-east-1"
# moto looks whether a request is signed, not how; an unsigned one may not replace an object.
_SIGNED = {"Authorization": f"AWS4-HMAC-SHA256 Credential={_KEY}/20260101/{_REGION}/s3/aws4_request"}


@dataclass(frozen=True)
class S3Server:
    """`storage_options` are for s3fs in this process, `env` for any client in another one."""

    endpoint_url: str

    @property
    def storage_options(self) -> dict[str, Any]:
        client_kwargs = {"endpoint_url": self.endpoint_url, "region_name": _REGION}
        return {"key": _KEY, "secret": _SECRET, "client_kwargs": client_kwargs}

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_DEFAULT_REGION": _REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str | None = None) -> str:
        """Make a bucket (three letters or more) and give its name; a fresh name if none is given."""
        bucket = name or f"bucket-{uuid.uuid4().hex[:12]}"
        with self._connected() as connection:
            _expect_success(connection, "PUT", f"/{bucket}", b"")
        return bucket

    def put(self, bucket: str, key: str, data: bytes) -> str:
        """Store an object and give its URL."""
        with self._connected() as connection:
            _expect_success(connection, "PUT", f"/{bucket}/{quote(key)}", data)
        return f"s3://{bucket}/{key}"

    def upload(self, folder: Path, bucket: str, prefix: str = "") -> str:
        """Store every file under `folder` and give the URL of the prefix."""
        with self._connected() as connection:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                key = "/".join(part for part in (prefix.strip("/"), path.relative_to(folder).as_posix()) if part)
                _expect_success(connection, "PUT", f"/{bucket}/{quote(key)}", path.read_bytes())
        return "/".join(part for part in (f"s3://{bucket}", prefix.strip("/")) if part)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[http.client.HTTPConnection]:
        parts = urlsplit(self.endpoint_url)
        with contextlib.closing(http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)) as connection:
            yield connection


def _expect_success(connection: http.client.HTTPConnection, method: str, target: str, body: bytes) -> None:
    connection.request(method, target, body=body, headers=_SIGNED)
    response = connection.getresponse()
    text = response.read()
    if response.status != 200:
        raise RuntimeError(f"{method} {target}: {response.status} {text.decode(errors='replace')}")


@contextlib.contextmanager
def s3_server(*, log_dir: Path) -> Iterator[S3Server]:
    """Run an empty S3 server while the block lasts."""
    with serving("support.s3_child", log_dir=log_dir) as url:
        yield S3Server(url)
