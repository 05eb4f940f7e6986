"""One GET, bounded in bytes, whose body is whole or an error. For web servers and Google Cloud Storage alike."""

from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import yarl

from pipeline.images.verdict import HttpStatusError, TruncatedBodyError, bad_address, retry_after_s, too_many_bytes

# A server that ignores Range sends the whole container; what lies before the range is read and dropped up to this.
_MAX_SKIPPED_BYTES = 256 << 20
_CHUNK_BYTES = 1 << 20


async def get_bytes(
    session: aiohttp.ClientSession,
    url: str,
    name: str,
    extent: tuple[int, int] | None,
    *,
    max_bytes: int,
    need: Callable[[int], None],
    request: Mapping[str, Any],
) -> bytes:
    """The body of `url`, or of it `extent`, (start, length) in bytes. `name` is what a message calls it.

    `need(nbytes)` is called before memory is spent. Raises ImageError `TooManyBytes` from the header alone where
    there is one, `BadAddress` for an address that cannot be one, HttpStatusError, TruncatedBodyError, and aiohttp's own
    exceptions.
    """
    options = dict(request)
    headers = {"Accept-Encoding": "identity", **options.pop("headers", {})}
    if extent is not None:
        headers["Range"] = f"bytes={extent[0]}-{extent[0] + extent[1] - 1}"
    timeout = aiohttp.ClientTimeout(total=None)  # the caller bounds the whole
    options.setdefault("timeout", timeout)
    async with session.get(_exact_url(url), headers=headers, **options) as response:
        if response.status not in {200, 206}:
            wait_s = retry_after_s(response.headers.get("Retry-After"))
            raise HttpStatusError(response.status, response.reason or "", wait_s)
        if extent is None:
            return await _whole_body(response, name, max_bytes, need)
        need(extent[1])
        return await _part_of_body(response, extent[0] if response.status == 200 else 0, extent[1])


def _exact_url(url: str) -> yarl.URL:
    """The address exactly as given, for a signature covers its bytes; quoted only where it could not be sent."""
    sendable = url.isascii() and url.isprintable() and " " not in url
    try:
        exact = yarl.URL(url, encoded=sendable)
        _ = exact.port  # of an encoded address it is not looked at before
    except ValueError as error:  # a port above 65535, brackets without their other half, a host of empty labels
        raise bad_address(url, error) from error
    return exact


async def _whole_body(
    response: aiohttp.ClientResponse, name: str, max_bytes: int, need: Callable[[int], None]
) -> bytes:
    encoded = response.headers.get("Content-Encoding", "identity") not in {"", "identity"}
    declared = None if encoded else response.content_length
    if declared is not None:
        if declared > max_bytes:
            raise too_many_bytes(name, declared, max_bytes)
        need(declared)
        body = await response.read()
        if len(body) < declared:
            raise TruncatedBodyError(f"the body ends after {len(body):,} of {declared:,} bytes")
        return body
    chunks: list[bytes] = []
    received, granted = 0, 0
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        received += len(chunk)
        if received > max_bytes:
            raise too_many_bytes(name, received, max_bytes)
        if received > granted:
            granted = min(max(2 * received, _CHUNK_BYTES), max_bytes)
            need(granted)
        chunks.append(chunk)
    return b"".join(chunks)


async def _part_of_body(response: aiohttp.ClientResponse, skip: int, length: int) -> bytes:
    if skip > _MAX_SKIPPED_BYTES:
        raise OSError(
            f"the server ignores byte ranges, and the range begins {skip:,} bytes into the container; "
            "serve the container from a store that knows ranges"
        )
    chunks: list[bytes] = []
    received = 0
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        chunk, skip = chunk[skip:], max(0, skip - len(chunk))
        chunks.append(chunk[: length - received])
        received += len(chunks[-1])
        if received == length:
            break
    if received < length:
        raise TruncatedBodyError(f"the container ends after {received:,} of the {length:,} bytes of the range")
    return b"".join(chunks)
