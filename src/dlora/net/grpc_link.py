"""One link over gRPC: its stream, and a slot for each direction between stream and conversation."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, TypeAlias

import grpc

from dlora.net.options import FLUSH_S
from dlora.net.slot import Slot
from dlora.net.transport import LinkDown, Traffic
from dlora.wire.frame import FrameKind

METHOD = "Talk"  # the method of the gRPC service that `FrameKind.service` names

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Call: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"

# The exceptions that gRPC raises when either end has ended a stream.
ENDED = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)


class GrpcLink:
    """One end of a link. Tasks of the network move frames between its two slots and the stream."""

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
        """Send a frame; waits until the frame before it is sent. Raises LinkDown, FrameError."""
        await self.outgoing.put(self.kind.encode(frame))

    async def receive(self) -> Any:
        """The next frame. Raises LinkDown when the link has ended."""
        return await self.incoming.get()

    @property
    def is_closed(self) -> bool:
        """Whether this end has ended the link."""
        return self._closed

    def close(self) -> None:
        """End the link."""
        self._closed = True
        self.incoming.close()
        self.outgoing.close()

    async def hang_up(self) -> None:
        """If this end dialled: say that no more frames come, and wait until the other end has read
        all of them, at most ``FLUSH_S``.

        gRPC drops what the other end has not read when a dialled call, or a read of it, is
        cancelled.
        """
        if isinstance(self.stream, grpc.aio.StreamStreamCall):
            with contextlib.suppress(*ENDED, TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    await self.stream.done_writing()
                    await self.stream.code()  # the other end has hung up as well

    async def write(self, traffic: Traffic) -> None:
        """Write outgoing frames to the stream until the link ends, and count them in ``traffic``.

        gRPC's write returns when HTTP/2's window had room for the frame.
        """
        with contextlib.suppress(*ENDED, LinkDown):
            try:
                while True:
                    data = await self.outgoing.get()
                    traffic.sent(self.neighbour, len(data))
                    await self.stream.write(data)
            finally:
                self.outgoing.close()
