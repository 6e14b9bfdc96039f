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
    """A request's body, inflated where it is compressed, of so many bytes at most.

    Raises:
        TooLargeError: it has more.
        ProblemError: it is compressed in an unknown way or not rightly (415, 400), does not come in time (408), or
            its client has gone (499, which nobody reads but the log); or all requests together hold too much (503).
    """
    body = bytearray()
    async for chunk in _pieces(request, limit):
        _take(request, len(chunk))
        body += chunk
    return bytes(body)


async def save_body(request: Request, limit: int, path: Path) -> str:
    """Writes a body to a file, so that a large one takes no memory; gives its sha256. Raises as `read_body` does."""
    found = hashlib.sha256()
    with path.open("wb") as file:
        async for chunk in _pieces(request, limit):
            found.update(chunk)
            file.write(chunk)
    return found.hexdigest()


def _take(request: Request, num_bytes: int) -> None:
    """Counts bytes that a request holds in memory until it is answered; all requests together may hold so much."""
    state, limits = request.app.state, request.app.state.service.limits
    if state.body_bytes + num_bytes > limits.bodies_bytes:
        raise ProblemError(
            503, f"Requests of {limits.bodies_bytes // 2**20} MiB together are being read.", {"Retry-After": "1"}
        )
    state.body_bytes += num_bytes
    request.state.body_bytes = getattr(request.state, "body_bytes", 0) + num_bytes


async def _pieces(request: Request, limit: int) -> AsyncIterator[bytes]:
    """A request's body as it comes, inflated where it is compressed; raises as `read_body` does."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", *_WINDOWS):
        raise ProblemError(415, f"Content-Encoding {encoding!r} is not understood: send {', '.join(_WINDOWS)} or none.")
    if int(request.headers.get("content-length", 0)) > limit:
        raise TooLargeError(f"The request's body has more than the {limit} bytes that are taken.")
    size, deadline = 0, asyncio.get_running_loop().time() + BODY_S
    chunks = _inflated(request, encoding, limit + 1)
    try:
        while True:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(chunks, None)
            if chunk is None:
                return
            size += len(chunk)
            if size > limit:
                raise TooLargeError(f"The request's body has more than the {limit} bytes that are taken.")
            yield chunk
    except TimeoutError as error:
        raise ProblemError(408, f"The request's body did not come within {BODY_S} s.") from error
    except ClientDisconnect as error:
        raise ProblemError(499, GONE) from error
    except zlib.error as error:
        raise ProblemError(400, f"The request's body is not one stream of {encoding}.") from error


async def _inflated(request: Request, encoding: str, most: int) -> AsyncIterator[bytes]:
    """The body piece by piece; no piece has more than `most` bytes."""
    inflate = zlib.decompressobj(_WINDOWS[encoding]) if encoding in _WINDOWS else None
    async for chunk in request.stream():
        yield chunk if inflate is None else inflate.decompress(chunk, most)
        if inflate is not None and inflate.unused_data:
            raise zlib.error("more after its end")
    if inflate is not None and not inflate.eof:
        raise zlib.error("cut off")


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Does some work for a request whose body has been read; it is cancelled when the client goes away.

    Raises:
        ProblemError: the client has gone (499, which nobody reads but the log).
    """
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
