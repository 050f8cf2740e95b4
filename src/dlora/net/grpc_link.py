"""One link over gRPC: the stream, and the two slots between it and a conversation."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, TypeAlias

import grpc

from dlora.net.slot import Slot
from dlora.net.transport import LinkDown, Traffic
from dlora.wire.frame import FrameKind

METHOD = "Talk"  # of a service that is named after what the links carry

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Call: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"

# What gRPC raises when a stream has ended, whichever end it was that ended it.
ENDED = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)


class GrpcLink:
    """One end of a link; tasks of the network carry frames between its two slots and the stream."""

    def __init__(
        self,
        neighbour: str,
        dialled_by: str,
        stream: Context | Call,
        kind: FrameKind,
        trusted: bytes,
    ) -> None:
        self.neighbour, self.dialled_by, self.stream, self.kind = (
            neighbour,
            dialled_by,
            stream,
            kind,
        )
        self.trusted = trusted  # the neighbour's certificates when the link was made
        self._closed = False
        self.incoming: Slot[Any] = Slot()
        self.outgoing: Slot[bytes] = Slot()

    async def send(self, frame: Any) -> None:
        """Hand a frame to the wire; waits while the one before it has not left. Raises LinkDown."""
        await self.outgoing.put(self.kind.encode(frame))

    async def receive(self) -> Any:
        """The next frame. Raises LinkDown at the end."""
        return await self.incoming.get()

    @property
    def is_closed(self) -> bool:
        """Whether this end has ended it."""
        return self._closed

    def close(self) -> None:
        """End the link."""
        self._closed = True
        self.incoming.close()
        self.outgoing.close()

    async def write(self, traffic: Traffic) -> None:
        """Frames out of the link; gRPC's write returns once HTTP/2 had room for the frame."""
        with contextlib.suppress(*ENDED, LinkDown):
            try:
                while True:
                    data = await self.outgoing.get()
                    traffic.sent(self.neighbour, len(data))
                    await self.stream.write(data)
            finally:
                self.outgoing.close()
