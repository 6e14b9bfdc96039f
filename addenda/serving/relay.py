"""Relays a request from a worker to the model's process, and the response back, over a socket pair of their own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable

import h11
from starlette.types import Receive, Scope, Send

PROTO = b"x-forwarded-proto"
HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"expect", b"date", PROTO})
"""Headers of one connection; each process adds its own date, and the worker what it has found about the protocol."""
READ_BYTES = 2**16

Headers = list[tuple[bytes, bytes]]


async def relay(handoff: socket.socket, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers an ASGI request with the response of the process at the other end of `handoff`.

    That process gets one end of a new socket pair, and serves it like a client's connection. It notices if the client
    disconnects, and this one if it ends.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            socket.send_fds(handoff, [b"\0"], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
    reader, writer = await asyncio.open_connection(sock=ours)
    connection = h11.Connection(h11.CLIENT)
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    headers = [*_end_to_end(scope["headers"]), (b"connection", b"close"), (PROTO, scope["scheme"].encode())]
    if not any(name == b"host" for name, _ in headers):  # HTTP/1.0
        headers.append((b"host", b""))
    writer.write(connection.send(h11.Request(method=scope["method"], target=target, headers=headers)) or b"")
    sending = asyncio.ensure_future(_send_body(connection, receive, writer))
    try:
        await _relay_response(connection, reader, send)
    except h11.RemoteProtocolError:  # the response is incomplete
        if not sending.done():  # and not because the client has disconnected
            raise
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.close()


async def _send_body(connection: h11.Connection, receive: Receive, writer: asyncio.StreamWriter) -> None:
    """Sends the body as it arrives; once the client disconnects, closes the connection to the other process."""
    while (message := await receive())["type"] == "http.request":
        writer.write(connection.send(h11.Data(data=message.get("body", b""))) or b"")
        if not message.get("more_body", False):
            writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
    writer.close()


async def _relay_response(connection: h11.Connection, reader: asyncio.StreamReader, send: Send) -> None:
    while True:
        match connection.next_event():
            case h11.NEED_DATA:
                connection.receive_data(await reader.read(READ_BYTES))
            case h11.Response() as response:
                headers = [header for header in _end_to_end(response.headers) if header[0] != b"transfer-encoding"]
                await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            case h11.Data() as part:
                await send({"type": "http.response.body", "body": bytes(part.data), "more_body": True})
            case _:  # the end, or that of the connection
                await send({"type": "http.response.body"})
                return


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP]
