"""Reading request bodies with limits on size, decompressed size and time; detecting disconnected clients."""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import AsyncIterator, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from addenda.exceptions import TooLargeError
from addenda.serving.problems import ProblemError
from addenda.serving.service import Service

Result = TypeVar("Result")
BODY_S = 60
"""Time limit for receiving a body, in seconds."""
GONE = "The client disconnected."
BINARY = {"type": "string", "format": "binary"}
"""The OpenAPI schema of bytes."""
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


def body_schema(schemas: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The OpenAPI request body of a route that reads the body itself, from a schema for each media type."""
    content = {media_type: {"schema": schema} for media_type, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


async def read_body(request: Request, limit: int) -> bytes:
    """Reads and decompresses a request's body; it counts towards the memory limit of all bodies until the response."""
    state, total_limit = request.app.state, request.app.state.service.limits.bodies_bytes
    body = bytearray()
    async for chunk in _chunks(request, limit):
        if state.body_bytes + len(chunk) > total_limit:
            detail = f"The bodies of all current requests exceed {total_limit // 2**20} MiB. Try again later."
            raise ProblemError(503, detail, {"Retry-After": "1"})
        body += chunk
        state.body_bytes += len(chunk)
        request.state.body_bytes = len(body)
    return bytes(body)


async def read_images(request: Request, service: Service) -> bytes:
    """Reads a body of images, or rejects the request at once if the queue is full."""
    with service.batcher.reserve(1):
        pass
    return await read_body(request, service.limits.body_bytes)


async def save_body(request: Request, limit: int, path: Path) -> str:
    """Streams a body to a file and returns its SHA-256."""
    sha256 = hashlib.sha256()
    with path.open("wb") as file:
        async for chunk in _chunks(request, limit):
            sha256.update(chunk)
            file.write(chunk)
    return sha256.hexdigest()


async def _chunks(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body as it arrives, decompressed; `limit` is in bytes, before and after decompression."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", *_WINDOWS):
        raise ProblemError(415, f"Content-Encoding {encoding!r} is not supported. Supported: {', '.join(_WINDOWS)}.")
    too_large = TooLargeError(f"The request's body exceeds {limit} bytes.")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    inflate = zlib.decompressobj(_WINDOWS[encoding]) if encoding in _WINDOWS else None
    size, deadline, chunks = 0, asyncio.get_running_loop().time() + BODY_S, aiter(request.stream())
    try:
        while True:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(chunks, None)
            if chunk is None:
                break
            if inflate is not None:
                chunk = inflate.decompress(chunk, limit + 1)
            size += len(chunk)
            if size > limit:
                raise too_large
            yield chunk
            if inflate is not None and inflate.unused_data:
                raise zlib.error("trailing data")
        if inflate is not None and not inflate.eof:
            raise zlib.error("truncated")
    except TimeoutError as error:
        raise ProblemError(408, f"The request's body did not arrive within {BODY_S} s.") from error
    except ClientDisconnect as error:
        raise ProblemError(499, GONE) from error  # for the log only
    except zlib.error as error:
        raise ProblemError(400, f"The request's body is not one valid {encoding} stream.") from error


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits `work` for a request whose body has been read, and cancels it when the client disconnects."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ProblemError(499, GONE)
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
