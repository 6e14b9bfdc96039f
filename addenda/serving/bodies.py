"""Reading requests: bounded in bytes, in inflated bytes and in time; and noticing that nobody waits any more."""

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
"""Seconds that a body may take to come."""
GONE = "The client has gone."
BINARY = {"type": "string", "format": "binary"}
"""The schema of bytes."""
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


def takes(schemas: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What OpenAPI says of a body that a route reads itself: a schema for each media type."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": one} for kind, one in schemas.items()}}}


async def read_body(request: Request, limit: int) -> bytes:
    """A request's body, inflated where it is compressed; it counts as held in memory until the request is answered."""
    state, together = request.app.state, request.app.state.service.limits.bodies_bytes
    body = bytearray()
    async for chunk in _pieces(request, limit):
        if state.body_bytes + len(chunk) > together:
            said = f"Requests of {together // 2**20} MiB together are being read."
            raise ProblemError(503, said, {"Retry-After": "1"})
        body += chunk
        state.body_bytes += len(chunk)
        request.state.body_bytes = len(body)
    return bytes(body)


async def read_images(request: Request, service: Service) -> bytes:
    """A body of images; while the queue is full it is refused before it is read for nothing."""
    with service.batcher.room(1):
        pass
    return await read_body(request, service.limits.body_bytes)


async def save_body(request: Request, limit: int, path: Path) -> str:
    """Writes a body to a file, so that a large one takes no memory; gives its sha256."""
    found = hashlib.sha256()
    with path.open("wb") as file:
        async for chunk in _pieces(request, limit):
            found.update(chunk)
            file.write(chunk)
    return found.hexdigest()


async def _pieces(request: Request, limit: int) -> AsyncIterator[bytes]:
    """A request's body as it comes, inflated where it is compressed, of so many bytes at most."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", *_WINDOWS):
        raise ProblemError(415, f"Content-Encoding {encoding!r} is not understood: send {', '.join(_WINDOWS)} or none.")
    too_large = TooLargeError(f"The request's body has more than the {limit} bytes that are taken.")
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
                raise zlib.error("more after its end")
        if inflate is not None and not inflate.eof:
            raise zlib.error("cut off")
    except TimeoutError as error:
        raise ProblemError(408, f"The request's body did not come within {BODY_S} s.") from error
    except ClientDisconnect as error:
        raise ProblemError(499, GONE) from error  # which nobody reads but the log
    except zlib.error as error:
        raise ProblemError(400, f"The request's body is not one stream of {encoding}.") from error


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Does some work for a request whose body has been read; it is cancelled when the client goes away."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ProblemError(499, GONE)
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
