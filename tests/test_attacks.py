"""Attacks on a listening peer: each is turned away, and a good neighbour is served before, meanwhile and afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from test_network import Loopback, run, running

from dlora.frames import MAX_CHUNK_BYTES, Frame, Status
from dlora.net import peer_pb2
from dlora.net.codec import MAX_FRAME_BYTES, encode_frame
from dlora.net.grpc import GrpcNetwork
from dlora.net.grpc_options import MAX_CONNECTIONS
from dlora.net.identity import federation_text, new_identity
from dlora.net.transport import Link, LinkDown

MIB = 1 << 20


def resident_bytes(key: str) -> int:
    """Of this process, from Linux: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Target:
    """Peer a listens and gives every frame back; b is the attacker's name, c the good neighbour's."""

    def __init__(self, folder: Path) -> None:
        self.net = Loopback(folder, listening="a", names="abc")
        self.refused: asyncio.Queue[str] = asyncio.Queue()
        self.heard: dict[str, list[Frame]] = {"b": [], "c": []}
        self.linked: list[str] = []

    @contextlib.asynccontextmanager
    async def listening(self, memory_bytes: int = 128 * MIB) -> AsyncIterator[int]:
        """And serving a good neighbour at the beginning and, whatever happened, at the end."""
        network = self.net.network("a", on_refused=self.refused.put_nowait)
        async with running(network.serve(self.echo)):
            await network.bound.wait()
            assert network.port is not None
            self.net.address("a", f"127.0.0.1:{network.port}")
            await self.serves_the_good_one()
            before = resident_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
            yield network.port
            assert resident_bytes("VmHWM") - before < memory_bytes  # the attackers' own part included: 200 TLS ends in one test
            await self.serves_the_good_one()

    async def echo(self, name: str, link: Link) -> None:
        self.linked.append(name)
        while True:
            frame = await link.receive()
            self.heard[name].append(frame)
            await link.send(frame)

    async def serves_the_good_one(self) -> None:
        served = asyncio.Event()

        async def talk(_: str, link: Link) -> None:
            await link.send(Status(7))
            assert await link.receive() == Status(7)
            served.set()
            with contextlib.suppress(LinkDown):
                await link.receive()

        network: GrpcNetwork = self.net.network("c", neighbours=["a"])
        async with running(network.serve(talk)):
            await asyncio.wait_for(served.wait(), 5)

    def renew_b(self, port: int) -> Path:
        """Give b another key, and the federation file another certificate instead of the old one; the new key file."""
        elsewhere = self.net.folder / "renewed"
        elsewhere.mkdir()
        key, member = new_identity("b", None, "peer", elsewhere)
        self.net.path.write_text(federation_text([member, *(self.net.folder / f"{name}.member.yaml" for name in "ac")]))
        self.net.address("a", f"127.0.0.1:{port}")
        return key

    def key(self, name: str) -> Path:
        return self.net.folder / f"{name}.key"

    def b_linked(self) -> bool:
        return "b" in self.linked


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(tmp_path)


# An attacker who writes bytes by hand

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def h2(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def open_stream(path: str = "/dlora.Peer/Talk") -> bytes:
    """Preface, settings, and the headers that call Talk (HPACK: literals, never indexed)."""
    headers = {
        ":method": "POST",
        ":scheme": "https",
        ":path": path,
        ":authority": "a",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in headers.items()
    )
    return PREFACE + h2(4, 0, 0, b"") + h2(1, 4, 1, block)


def announced(num_bytes: int) -> bytes:
    """The beginning of a gRPC message of that length."""
    return struct.pack(">BI", 0, num_bytes)


def tls(certificate: Path | None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate)  # key and certificates in one file
    return context


class Raw:
    """A connection whose owner keeps no rules."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


@contextlib.asynccontextmanager
async def connected(port: int, context: ssl.SSLContext | None) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()


# Who are you?


def forged_by(signer: Path, name: str, folder: Path) -> Path:
    """A key of our own, and a certificate for it in another member's name that ``signer`` has signed."""
    pem = signer.read_bytes()
    signing = serialization.load_pem_private_key(pem, None)
    issuer = x509.load_pem_x509_certificate(pem)
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    forged = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(signing, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "forged.key"
    path.write_bytes(
        private + forged.public_bytes(serialization.Encoding.PEM) + issuer.public_bytes(serialization.Encoding.PEM)
    )
    return path


async def answered(port: int, certificate: Path | None) -> bool:
    """Whether one byte of HTTP/2 comes back. With TLS 1.3 a client's handshake is over before the listener has judged."""
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        async with connected(port, tls(certificate)) as raw:
            await raw.say(open_stream())
            return await asyncio.wait_for(raw.reader.read(1), 5) != b""
    return False


@pytest.mark.parametrize("who", ["nobody", "a stranger", "a stranger called b", "a stranger called a", "c signed by b"])
def test_without_a_listed_certificate_there_is_no_stream(target: Target, who: str, tmp_path: Path) -> None:
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


def test_a_certificate_of_an_older_file_is_no_good_at_once(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the handler, while TLS still lets it through."""
    monkeypatch.setattr("dlora.net.grpc.RELOAD_S", 1000)

    async def main() -> None:
        async with target.listening() as port:
            target.renew_b(port)
            async with connected(port, tls(target.key("b"))) as raw:
                await raw.say(open_stream())
                assert "not a certificate that a's federation file lists for b" in await target.refused.get()
            assert target.linked == ["c"]

    run(main())


def test_a_certificate_of_an_older_file_is_no_good_for_tls_either(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soon after, without a restart; the new one is good, and a link that was up stays up."""
    monkeypatch.setattr("dlora.net.grpc.RELOAD_S", 0.01)

    async def main() -> None:
        stays = asyncio.Event()

        async def talk(_: str, link: Link) -> None:
            for round in (1, 2):
                await link.send(Status(round))
                assert await link.receive() == Status(round)
                await stays.wait()
            stays.clear()
            await link.receive()

        async with target.listening() as port, running(target.net.network("c", neighbours=["a"]).serve(talk)):
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
    """The attacker's tools work: what the tests around this one see is refusal, not a slip of theirs."""

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
            target.net.path.write_text(federation_text([tmp_path / f"{name}.member.yaml" for name in "ac"]))
            target.net.address("a", f"127.0.0.1:{port}")
            await raw.say(h2(0, 0, 1, announced(len(data)) + data))
            assert await target.refused.get() == "b: its certificates in the federation file have changed"
            assert target.heard["b"] == [Status(5)]

    run(main())


def test_tls_1_2_is_refused(target: Target) -> None:
    async def main() -> None:
        async with target.listening() as port, connected(port, tls(target.key("b"), ssl.TLSVersion.TLSv1_2)) as raw:
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
        (peer_pb2.Frame(want=peer_pb2.Want(name="../b.key")).SerializeToString(), "the message name '../b.key'"),
        (peer_pb2.Frame(chunk=peer_pb2.Chunk(name="a", data=bytes(MAX_CHUNK_BYTES + 1))).SerializeToString(), "bytes of data"),
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


@contextlib.asynccontextmanager
async def channel(target: Target, port: int) -> AsyncIterator[grpc.aio.StreamStreamCall[bytes, bytes]]:
    """A stream of gRPC's own, as b, with nothing of dlora on its side."""
    identity = target.net.network("b").identity
    trusted = target.net.network("b").federation.current.trusted(["a"])
    credentials = grpc.ssl_channel_credentials(trusted, identity.key_pem, identity.certificate_pem)
    options = [("grpc.ssl_target_name_override", "a")]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as opened:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = opened.stream_stream("/dlora.Peer/Talk")()
        yield call


def test_an_oversized_message_ends_the_link(target: Target) -> None:
    async def main() -> None:
        async with target.listening() as port, channel(target, port) as call:
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                await call.write(bytes(MAX_FRAME_BYTES + 1))
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert target.heard["b"] == []

    run(main())


def test_a_gigabyte_of_garbage(tmp_path: Path) -> None:
    """On every layer; in a process of its own, for what other tests left in this one moves its memory too."""
    process = multiprocessing.get_context("spawn").Process(target=pour_garbage_on_every_layer, args=(tmp_path,))
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


def test_a_slow_drip_holds_nothing_but_its_own_link(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlora.net.grpc.FIRST_FRAME_S", 0.5)

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
            context = {"TCP": None, "TLS without a certificate": tls(None), "TLS with a certificate": tls(target.key("b"))}[
                kind
            ]

            async def connect() -> None:
                with contextlib.suppress(ssl.SSLError, ConnectionError):
                    await stack.enter_async_context(connected(port, context))

            await asyncio.gather(*(connect() for _ in range(200)))
            await target.serves_the_good_one()

    run(main())


def test_more_connections_than_there_is_room_for(target: Target) -> None:
    """Those beyond are closed at once; a link that is up goes on; with room again, new ones come up."""

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
