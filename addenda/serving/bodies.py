"""Reading requests: bounded in bytes, in inflated bytes and in time; and noticing that nobody waits any more."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from addenda.exceptions import TooLargeError
from addenda.serving.problems import ProblemError

Result = TypeVar("Result")
BODY_S = 60
"""Seconds that a body may take to come."""
GONE = "The client has gone."
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


async def read_body(request: Request, limit: int) -> bytes:
    """A request's body, inflated where it is compressed.

    Args:
        request: whose body it is.
        limit: most bytes that it may have, after inflating too.

    Raises:
        TooLargeError: it has more.
        ProblemError: it is compressed in an unknown way or not rightly (415, 400), does not come in time (408), or
            its client has gone (499, which nobody reads but the log).
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", *_WINDOWS):
        raise ProblemError(415, f"Content-Encoding {encoding!r} is not understood: send {', '.join(_WINDOWS)} or none.")
    if int(request.headers.get("content-length", 0)) > limit:
        raise TooLargeError(f"The request's body has more than the {limit} bytes that are taken.")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in _inflated(request, encoding, limit + 1):
                body += chunk
                if len(body) > limit:
                    raise TooLargeError(f"The request's body has more than the {limit} bytes that are taken.")
    except TimeoutError as error:
        raise ProblemError(408, f"The request's body did not come within {BODY_S} s.") from error
    except ClientDisconnect as error:
        raise ProblemError(499, GONE) from error
    except zlib.error as error:
        raise ProblemError(400, f"The request's body is not one stream of {encoding}.") from error
    return bytes(body)


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
