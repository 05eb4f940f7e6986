"""A Google Cloud Storage endpoint (JSON API) on a free loopback port."""

import contextlib
import http.client
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from support.processes import serving


@dataclass(frozen=True)
class GcsServer:
    """`storage_options` are for gcsfs in this process, `env` for gcsfs in another one."""

    endpoint_url: str

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"token": "anon", "endpoint_url": self.endpoint_url}

    @property
    def env(self) -> dict[str, str]:
        return {
            "STORAGE_EMULATOR_HOST": self.endpoint_url,
            # Without it gcsfs asks over gRPC what kind of bucket it is, and waits: the emulator has no gRPC.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            # fsspec's own way to set an option; else gcsfs looks for credentials, on the network at last.
            "FSSPEC_GCS_TOKEN": "anon",
        }

    def make_bucket(self, name: str | None = None) -> str:
        """Make a bucket (three letters or more) and give its name; a fresh name if none is given."""
        bucket = name or f"bucket-{uuid.uuid4().hex[:12]}"
        with self._connected() as connection:
            _post(connection, "/storage/v1/b?project=test", json.dumps({"name": bucket}).encode(), "application/json")
        return bucket

    def put(self, bucket: str, key: str, data: bytes) -> str:
        """Store an object and give its URL."""
        with self._connected() as connection:
            _upload(connection, bucket, key, data)
        return f"gs://{bucket}/{key}"

    def upload(self, folder: Path, bucket: str, prefix: str = "") -> str:
        """Store every file under `folder` and give the URL of the prefix."""
        with self._connected() as connection:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                key = "/".join(part for part in (prefix.strip("/"), path.relative_to(folder).as_posix()) if part)
                _upload(connection, bucket, key, path.read_bytes())
        return "/".join(part for part in (f"gs://{bucket}", prefix.strip("/")) if part)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[http.client.HTTPConnection]:
        parts = urlsplit(self.endpoint_url)
        with contextlib.closing(http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)) as connection:
            yield connection


def _upload(connection: http.client.HTTPConnection, bucket: str, key: str, data: bytes) -> None:
    target = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(key, safe='')}"
    _post(connection, target, data, "application/octet-stream")


def _post(connection: http.client.HTTPConnection, target: str, body: bytes, content_type: str) -> None:
    connection.request("POST", target, body=body, headers={"Content-Type": content_type})
    response = connection.getresponse()
    text = response.read()
    if response.status != 200:
        raise RuntimeError(f"POST {target}: {response.status} {text.decode(errors='replace')}")


@contextlib.contextmanager
def gcs_server(*, log_dir: Path) -> Iterator[GcsServer]:
    """Run an empty Google Cloud Storage server while the block lasts."""
    with serving("support.gcs_child", log_dir=log_dir) as url:
        yield GcsServer(url)
