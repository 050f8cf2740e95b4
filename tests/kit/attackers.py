"""A peer under attack, and what strangers and members can send to its port."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dlora.identity.federation import federation_text
from dlora.identity.keys import new_identity
from dlora.net.grpc import GrpcNetwork
from dlora.net.transport import LinkDown
from dlora.wire.frame import Link
from dlora.wire.peer.frames import Frame, Status
from kit.loopback import Loopback, running

MIB = 1 << 20


def resident_bytes(key: str) -> int:
    """Of this process, from Linux: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Target:
    """Peer a listens and gives every frame back; b is the attacker's name, c the good
    neighbour's.
    """

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
            # the attackers' own part included: 200 TLS ends in one test
            assert resident_bytes("VmHWM") - before < memory_bytes
            await self.serves_the_good_one()

    async def echo(self, name: str, link: Link) -> None:
        self.linked.append(name)
        while True:
            frame = await link.receive()
            self.heard[name].append(frame)
            await link.send(frame)

    async def serves_the_good_one(self, within_s: float = 5) -> None:
        served = asyncio.Event()

        async def talk(_: str, link: Link) -> None:
            await link.send(Status(7))
            assert await link.receive() == Status(7)
            served.set()
            with contextlib.suppress(LinkDown):
                await link.receive()

        network: GrpcNetwork = self.net.network("c", neighbours=["a"])
        async with running(network.serve(talk)):
            await asyncio.wait_for(served.wait(), within_s)

    def renew_b(self, port: int) -> Path:
        """Give b another key, and the federation file another certificate instead of the old one;
        the new key file.
        """
        elsewhere = self.net.folder / "renewed"
        elsewhere.mkdir()
        key, member = new_identity("b", None, "peer", elsewhere)
        self.net.path.write_text(
            federation_text([member, *(self.net.folder / f"{name}.member.yaml" for name in "ac")])
        )
        self.net.address("a", f"127.0.0.1:{port}")
        return key

    def key(self, name: str) -> Path:
        return self.net.folder / f"{name}.key"

    def b_linked(self) -> bool:
        return "b" in self.linked


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
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    return PREFACE + h2(4, 0, 0, b"") + h2(1, 4, 1, block)


def announced(num_bytes: int) -> bytes:
    """The beginning of a gRPC message of that length."""
    return struct.pack(">BI", 0, num_bytes)


def tls(
    certificate: Path | None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> ssl.SSLContext:
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
    """A key of our own, and a certificate for it in another member's name that ``signer`` has
    signed.
    """
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
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "forged.key"
    path.write_bytes(
        private
        + forged.public_bytes(serialization.Encoding.PEM)
        + issuer.public_bytes(serialization.Encoding.PEM)
    )
    return path


@contextlib.asynccontextmanager
async def channel(
    target: Target, port: int
) -> AsyncIterator[grpc.aio.StreamStreamCall[bytes, bytes]]:
    """A stream of gRPC's own, as b, with nothing of dlora on its side."""
    identity = target.net.network("b").identity
    trusted = target.net.network("b").federation.current.trusted(["a"])
    credentials = grpc.ssl_channel_credentials(trusted, identity.key_pem, identity.certificate_pem)
    options = [("grpc.ssl_target_name_override", "a")]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as opened:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = opened.stream_stream("/dlora.Peer/Talk")()
        yield call
