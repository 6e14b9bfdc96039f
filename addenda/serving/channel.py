"""The protocol between a worker and the model's process: small messages, in order, over a socket pair."""

from __future__ import annotations

import asyncio
import socket
from enum import IntEnum, auto
from struct import Struct
from typing import NamedTuple

_HEADER = Struct("<BIQI")  # kind, number, value, length of the payload


class Kind(IntEnum):
    """The kinds of messages."""

    HELLO = auto()  # from a worker: it has started. number: its process id
    SNAPSHOT = auto()  # to a worker: serve this snapshot from now on. value: its number; payload: JSON
    SERVING = auto()  # from a worker: it does. value: the snapshot's number
    RELEASE = auto()  # from a worker: no request uses a snapshot any more. value: its number
    PREDICT = auto()  # from a worker. number: of the request; value: the snapshot's; payload: JSON
    CANCEL = auto()  # from a worker. number: of the request
    LOGITS = auto()  # to a worker. number: of the request; value: microseconds per image; payload: rows of float32
    FAILED = auto()  # to a worker. number: of the request; payload: JSON of an error
    COUNT = auto()  # from a worker: it has answered a request. payload: JSON for the metrics
    STOP = auto()  # to a worker: accept no more connections, complete all requests, end


class Message(NamedTuple):
    """A message; its kind says what the fields mean. Every PREDICT gets one LOGITS or FAILED, cancelled or not."""

    kind: Kind
    number: int = 0
    value: int = 0
    payload: bytes = b""


class Channel:
    """One end of the socket pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def over(cls, end: socket.socket) -> Channel:
        """Opens a channel over a connected socket."""
        return cls(*await asyncio.open_connection(sock=end))

    def send(self, message: Message) -> None:
        """Sends a message; after the other end has closed it is dropped."""
        self._writer.write(_HEADER.pack(message.kind, message.number, message.value, len(message.payload)))
        self._writer.write(message.payload)

    async def receive(self) -> Message | None:
        """The next message; None once the other end has closed, or its process has ended."""
        try:
            kind, number, value, length = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
            return Message(Kind(kind), number, value, await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            return None

    def close(self) -> None:
        """Closes this end."""
        self._writer.close()
