"""Attacks on a listening peer: each is turned away, and a good neighbour is served before,
meanwhile and afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
import ssl
import struct
from pathlib import Path

import grpc
import pytest

from dlora.identity.federation import federation_text
from dlora.identity.keys import new_identity
from dlora.net.options import MAX_CONNECTIONS
from dlora.wire.frame import Link
from dlora.wire.peer import peer_pb2
from dlora.wire.peer.codec import MAX_FRAME_BYTES, encode_frame
from dlora.wire.peer.frames import MAX_CHUNK_BYTES, Status
from kit.attackers import (
    MIB,
    PREFACE,
    Target,
    announced,
    channel,
    connected,
    forged_by,
    h2,
    open_stream,
    tls,
)
from kit.loopback import run, running


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(tmp_path)


async def answered(port: int, certificate: Path | None) -> bool:
    """Whether one byte of HTTP/2 comes back. With TLS 1.3 a client's handshake is over before the
    listener has judged.
    """
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        async with connected(port, tls(certificate)) as raw:
            await raw.say(open_stream())
            return await asyncio.wait_for(raw.reader.read(1), 5) != b""
    return False


@pytest.mark.parametrize(
    "who", ["nobody", "a stranger", "a stranger called b", "a stranger called a", "c signed by b"]
)
def test_without_a_listed_certificate_there_is_no_stream(
    target: Target, who: str, tmp_path: Path
) -> None:
    """Turned away below Python, in the handshake."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    certificate: Path | None = None
    if who == "c signed by b":
        certificate = forged_by(target.key("b"), "c", elsewhere)
    elif who != "nobody":
        certificate = new_identity(who[-1] if "called" in who else "d", None, "peer", elsewhere)[0]

    async def main() -> None:
        async with target.listening() as port:
            assert not await answered(port, certificate)
            assert target.linked == ["c"]

    run(main())


def test_a_certificate_of_an_older_file_is_no_good_at_once(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the handler, while TLS still lets it through."""
    monkeypatch.setattr("dlora.net.options.RELOAD_S", 1000)

    async def main() -> None:
        async with target.listening() as port:
            target.renew_b(port)
            async with connected(port, tls(target.key("b"))) as raw:
                await raw.say(open_stream())
                assert (
                    "not a certificate that a's federation file lists for b"
                    in await target.refused.get()
                )
            assert target.linked == ["c"]

    run(main())


def test_a_certificate_of_an_older_file_is_no_good_for_tls_either(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soon after, without a restart; the new one is good, and a link that was up stays up."""
    monkeypatch.setattr("dlora.net.options.RELOAD_S", 0.01)

    async def main() -> None:
        stays = asyncio.Event()

        async def talk(_: str, link: Link) -> None:
            for round in (1, 2):
                await link.send(Status(round))
                assert await link.receive() == Status(round)
                await stays.wait()
            stays.clear()
            await link.receive()

        async with (
            target.listening() as port,
            running(target.net.network("c", neighbours=["a"]).serve(talk)),
        ):
            while target.heard["c"].count(Status(1)) == 0:
                await asyncio.sleep(0.01)
            new = target.renew_b(port)
            while await answered(port, target.key("b")):
                await asyncio.sleep(0.01)
            assert await answered(port, new)
            stays.set()
            while target.heard["c"].count(Status(2)) == 0:
                await asyncio.sleep(0.01)

    run(main())


def test_the_listed_certificate_gets_a_stream(target: Target) -> None:
    """The attacker's tools work: what the tests around this one see is refusal, not a slip of
    theirs.
    """

    async def main() -> None:
        async with target.listening() as port, connected(port, tls(target.key("b"))) as raw:
            data = encode_frame(Status(5))
            await raw.say(open_stream() + h2(0, 0, 1, announced(len(data)) + data))
            got = b""
            while announced(len(data)) + data not in got:
                got += await raw.reader.read(MIB)
            assert target.heard["b"] == [Status(5)]

    run(main())


def test_a_member_struck_off_loses_its_link(target: Target, tmp_path: Path) -> None:
    async def main() -> None:
        async with target.listening() as port, connected(port, tls(target.key("b"))) as raw:
            data = encode_frame(Status(5))
            await raw.say(open_stream() + h2(0, 0, 1, announced(len(data)) + data))
            while not target.heard["b"]:
                await raw.reader.read(MIB)
            target.net.path.write_text(
                federation_text([tmp_path / f"{name}.member.yaml" for name in "ac"])
            )
            target.net.address("a", f"127.0.0.1:{port}")
            await raw.say(h2(0, 0, 1, announced(len(data)) + data))
            assert (
                await target.refused.get()
                == "b: its certificates in the federation file have changed"
            )
            assert target.heard["b"] == [Status(5)]

    run(main())


def test_tls_1_2_is_refused(target: Target) -> None:
    async def main() -> None:
        async with (
            target.listening() as port,
            connected(port, tls(target.key("b"), ssl.TLSVersion.TLSv1_2)) as raw,
        ):
            await raw.say(open_stream())
            assert "TLSv1.2 instead of TLSv1.3" in await target.refused.get()
            assert not target.b_linked()

    run(main())


# A member with a good certificate and bad intentions


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "a frame of no known kind"),
        (b"\x80" * 100, "100 bytes that are no frame"),
        (
            peer_pb2.Frame(want=peer_pb2.Want(name="../b.key")).SerializeToString(),
            "the message name '../b.key'",
        ),
        (
            peer_pb2.Frame(
                chunk=peer_pb2.Chunk(name="a", data=bytes(MAX_CHUNK_BYTES + 1))
            ).SerializeToString(),
            "bytes of data",
        ),
    ],
    ids=["empty", "garbage", "a path", "too much data"],
)
def test_an_invalid_frame_ends_the_link(target: Target, data: bytes, words: str) -> None:
    async def main() -> None:
        async with target.listening() as port, channel(target, port) as call:
            await call.write(data)
            assert await call.read() is grpc.aio.EOF
            reason = await target.refused.get()
            assert reason.startswith("b: ")
            assert words in reason
            assert target.heard["b"] == []

    run(main())


def test_an_oversized_message_ends_the_link(target: Target) -> None:
    async def main() -> None:
        async with target.listening() as port, channel(target, port) as call:
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                await call.write(bytes(MAX_FRAME_BYTES + 1))
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert target.heard["b"] == []

    run(main())


def test_a_gigabyte_of_garbage(tmp_path: Path) -> None:
    """On every layer; in a process of its own, for what other tests left in this one moves its
    memory too.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=pour_garbage_on_every_layer, args=(tmp_path,)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0  # its own words are among what was printed


def pour_garbage_on_every_layer(folder: Path) -> None:
    for layer in ("TCP", "TLS record", "TLS", "HTTP/2 frame", "gRPC message"):
        print(f"garbage on layer {layer}")
        place = folder / layer.replace("/", "-")
        place.mkdir()
        pour_garbage(Target(place), layer)


def pour_garbage(target: Target, layer: str) -> None:
    """Announced wherever a length can be announced, and sent for as long as anybody takes it."""
    garbage = b"\xa5" * MIB
    opening = {
        "TCP": b"",
        "TLS record": b"\x16\x03\x01\xff\xff\x01\xff\xff\xff",
        "TLS": b"",
        "HTTP/2 frame": PREFACE + h2(4, 0, 0, b"") + b"\xff\xff\xff" + struct.pack(">BBI", 0, 0, 1),
        "gRPC message": open_stream() + h2(0, 0, 1, announced(1 << 30) + bytes(1000)),
    }[layer]

    def pour(port: int) -> int:
        """MiB that were taken."""
        context = None if layer in ("TCP", "TLS record") else tls(target.key("b"))
        piece = h2(0, 0, 1, garbage[:16384]) * 64 if layer == "gRPC message" else garbage
        with socket.create_connection(("127.0.0.1", port), timeout=2) as plain:
            connection = plain if context is None else context.wrap_socket(plain)
            with connection:
                connection.sendall(opening)
                for number in range(1024):
                    try:
                        connection.sendall(piece)
                    except OSError:
                        return number
        return 1024

    async def main() -> None:
        async with target.listening(64 * MIB) as port:
            assert await asyncio.to_thread(pour, port) < 512
            assert target.heard["b"] == []

    run(main())


def test_a_slow_drip_holds_nothing_but_its_own_link(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlora.net.links.FIRST_FRAME_S", 0.5)

    async def main() -> None:
        async with target.listening() as port, connected(port, tls(target.key("b"))) as raw:
            await raw.say(open_stream() + h2(0, 0, 1, announced(1000)))

            async def drip() -> None:
                while True:
                    await raw.say(h2(0, 0, 1, b"\x00"))
                    await asyncio.sleep(0.01)

            dripping = asyncio.ensure_future(drip())
            await target.serves_the_good_one()
            assert await target.refused.get() == "b: no frame within 0.5 s"
            dripping.cancel()
            await asyncio.wait({dripping})
            assert target.heard["b"] == []

    run(main())


@pytest.mark.parametrize("kind", ["TCP", "TLS without a certificate", "TLS with a certificate"])
def test_200_connections_at_once(target: Target, kind: str) -> None:
    """All held open; the good neighbour gets its link all the same."""
    assert MAX_CONNECTIONS > 200

    async def main() -> None:
        async with target.listening() as port, contextlib.AsyncExitStack() as stack:
            context = {
                "TCP": None,
                "TLS without a certificate": tls(None),
                "TLS with a certificate": tls(target.key("b")),
            }[kind]

            async def connect() -> None:
                with contextlib.suppress(ssl.SSLError, ConnectionError):
                    await stack.enter_async_context(connected(port, context))

            await asyncio.gather(*(connect() for _ in range(200)))
            await target.serves_the_good_one()

    run(main())


def test_more_connections_than_there_is_room_for(target: Target) -> None:
    """Those beyond are closed at once; a link that is up goes on; with room again, new ones come
    up.
    """

    async def main() -> None:
        async with target.listening() as port, channel(target, port) as call:
            await call.write(encode_frame(Status(1)))
            assert await call.read() == encode_frame(Status(1))
            held = []
            for _ in range(MAX_CONNECTIONS + 20):
                connection = socket.create_connection(("127.0.0.1", port))
                connection.setblocking(False)
                held.append(connection)
            loop = asyncio.get_running_loop()
            last = await asyncio.wait_for(loop.sock_recv(held[-1], 1), 5)
            assert last == b""
            await call.write(encode_frame(Status(2)))
            assert await call.read() == encode_frame(Status(2))
            for connection in held:
                connection.close()

    run(main())
