"""Objects of S3 with one signed GET each, a quarter of the work that a call through botocore costs.

Account, endpoint and addressing style are s3fs's and botocore's, who find credentials wherever the ecosystem keeps
them; only the request itself is ours. Where anything about the access is out of the
ordinary, s3fs makes the call.
"""

import os
import ssl
import weakref
from typing import Any, NamedTuple
from urllib.request import getproxies

import aiohttp
from botocore import UNSIGNED  # type: ignore[import-untyped]
from botocore.httpsession import get_cert_path  # type: ignore[import-untyped]
from botocore.utils import percent_encode  # type: ignore[import-untyped]
from fsspec import AbstractFileSystem

from pipeline.images.http import Need, get_bytes
from pipeline.images.sigv4 import signed_headers
from pipeline.images.verdict import HttpStatusError, TruncatedBodyError, too_many_bytes

# Answers by which S3 says that the bucket is elsewhere or wants another signature; botocore knows what to do then.
_ELSEWHERE = frozenset({301, 302, 307, 308, 400})
# Settings that change nothing about a request, or that are read off the client.
_PLAIN_CONFIG = frozenset(
    {"retries", "max_pool_connections", "signature_version", "connect_timeout", "read_timeout", "s3"}
)
_PLAIN_CLIENT = frozenset(
    {"endpoint_url", "region_name", "aws_access_key_id", "aws_secret_access_key", "aws_session_token"}
)


class _Direct(NamedTuple):
    """What a direct request needs: the client that knows the account, and the address of each bucket met so far.

    None as an address: requests for that bucket go through s3fs.
    """

    client: Any
    session: aiohttp.ClientSession
    buckets: dict[str, str | None]


_DIRECT: "weakref.WeakKeyDictionary[AbstractFileSystem, _Direct]" = weakref.WeakKeyDictionary()


def single_try_s3(fs: AbstractFileSystem, concurrency: int) -> AbstractFileSystem:
    """The same S3 access as `fs`, without the retries of s3fs and of botocore beneath it."""
    config = dict(fs.storage_options.get("config_kwargs") or {})
    config["retries"] = {"total_max_attempts": 1, "mode": "standard"}
    config["max_pool_connections"] = max(concurrency, int(config.get("max_pool_connections", 10)))
    config.setdefault("signature_version", "s3v4")
    single = type(fs)(*fs.storage_args, **{**fs.storage_options, "config_kwargs": config})
    single.retries = 1
    return single


async def read_s3(fs: Any, path: str, extent: tuple[int, int] | None, max_bytes: int, need: Need) -> bytes:
    """The whole object, or `extent` (start, length in bytes) of it. `fs` is from `single_try_s3`.

    Raises as `http.get_bytes` does, or what s3fs raises.
    """
    bucket, _, key = path.partition("/")
    direct = await _direct_access(fs)
    address = None if direct is None else await _bucket_address(direct, bucket)
    if direct is None or address is None:
        return await _read_by_s3fs(fs, path, extent, max_bytes, need)
    url = address + percent_encode(key, safe="/~")
    try:
        request = {"headers": await _signature(direct.client, url), "allow_redirects": False}
        name = f"s3://{path}"
        return await get_bytes(direct.session, url, name, extent, max_bytes=max_bytes, need=need, request=request)
    except HttpStatusError as error:
        if error.status not in _ELSEWHERE:
            raise
        direct.buckets[bucket] = None
        return await _read_by_s3fs(fs, path, extent, max_bytes, need)


async def _direct_access(fs: Any) -> _Direct | None:
    """The direct way for `fs`, None where its settings ask for more than a plain signed request."""
    direct = _DIRECT.get(fs)
    if direct is None:
        client = await fs.set_session()
        if not _is_plain(fs):
            return None
        trusted = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or get_cert_path(True))
        connector = aiohttp.TCPConnector(limit=0, ssl=trusted)
        # Looking for a proxy costs each request a thread switch, so only where there is one.
        session = aiohttp.ClientSession(connector=connector, trust_env=bool(getproxies()))
        weakref.finalize(fs, fs.close_session, fs.loop, session)
        direct = _DIRECT[fs] = _Direct(client, session, {})
    return direct


def _is_plain(fs: Any) -> bool:
    return not (
        fs.s3_additional_kwargs
        or fs.requester_pays
        or fs.cache_regions
        or fs.version_aware
        or set(fs.config_kwargs) - _PLAIN_CONFIG
        or set(fs.client_kwargs) - _PLAIN_CLIENT
        or fs.config_kwargs.get("signature_version") not in {"s3v4", UNSIGNED}
    )


async def _bucket_address(direct: _Direct, bucket: str) -> str | None:
    """`https://…/` of a bucket, as botocore would address it; None for access points and directory buckets."""
    if bucket not in direct.buckets:
        plain = ":" not in bucket and not bucket.endswith("--x-s3")
        url = await direct.client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": "k"}) if plain else ""
        direct.buckets[bucket] = url.partition("?")[0].removesuffix("k") or None
    return direct.buckets[bucket]


async def _signature(client: Any, url: str) -> dict[str, str]:
    """Headers that sign a GET of `url` (AWS Signature Version 4); none for anonymous access."""
    if client.meta.config.signature_version is UNSIGNED:
        return {}
    credentials = await client._request_signer._credentials.get_frozen_credentials()
    return signed_headers(url, credentials, client.meta.region_name)


async def _read_by_s3fs(fs: Any, path: str, extent: tuple[int, int] | None, max_bytes: int, need: Need) -> bytes:
    bucket, key, version = fs.split_path(path)
    options = {"VersionId": version} if version else {}
    if extent is not None:
        options["Range"] = f"bytes={extent[0]}-{extent[0] + extent[1] - 1}"
    response = await fs._call_s3("get_object", Bucket=bucket, Key=key, **options)
    body, size = response["Body"], response["ContentLength"]
    expected = size if extent is None else extent[1]
    try:
        if size > (max_bytes if extent is None else expected):
            raise too_many_bytes(f"s3://{path}", size, max_bytes)
        need(size)
        data: bytes = await body.read()
    finally:
        body.close()
    if len(data) < expected:
        raise TruncatedBodyError(f"the object ends after {len(data):,} of {expected:,} bytes")
    return data
