"""Attacks on a cloud's port: each is turned away, and a good device is served before, meanwhile and
afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from dlora.config.run import Config
from dlora.identity.federation import Federation, FederationFile, federation_text
from dlora.identity.keys import Identity, new_identity
from dlora.net.channel import Dialler
from dlora.net.grpc import GrpcNetwork
from dlora.net.loop_thread import LoopThread
from dlora.train import forward
from dlora.wire.frame import ChannelDown
from dlora.wire.split.codec import encode_split, split_kind
from dlora.wire.split.frames import Begin, Done, Drop, Failed, Open, Opened, SplitFrame, Values
from kit import queue_cloud
from kit.attackers import (
    MIB,
    PREFACE,
    announced,
    connected,
    forged_by,
    h2,
    open_stream,
    resident_bytes,
    tls,
)
from kit.processes import until
from kit.serving_cloud import PATIENCE_S, Members, Serving, manifest_of, opened, serving

MEMORY_BYTES = 64 * MIB  # that an attack may cost, the attacker's own buffers included
TALK = "/dlora.split.Cloud/Talk"


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    return Members(tmp_path_factory.mktemp("members"))


class Target:
    """A cloud under attack, and a good device called tablet."""

    def __init__(self, members: Members, served: Serving, config: Config) -> None:
        self.members, self.served, self.half = members, served, queue_cloud.device_half(config)
        self.manifest = manifest_of(self.half)
        self.port = int(members.address.rpartition(":")[2])

    def serves_the_good_one(self) -> None:
        """A whole step over a link of its own, which has ended on both sides when this returns."""
        before = len(self.served.heard("closed", device="tablet"))
        with self.members.dialler("tablet") as dialler:
            self.half.link(dialler.dial, 1, lambda seconds: None)
            factors = queue_cloud.factors(self.half.model)
            self.half.model.use(factors)
            forward(self.half.model, queue_cloud.batch()).sum().backward()
            assert all(factor.grad is not None for factor in factors.values())
        until(
            lambda: len(self.served.heard("closed", device="tablet")) > before,
            "its link to end",
            PATIENCE_S,
        )

    def refused(self, words: str) -> None:
        """Wait until the cloud tells of it."""
        until(
            lambda: any(
                words in event["reason"] for event in self.served.heard("connection-refused")
            ),
            words,
            PATIENCE_S,
        )

    @property
    def opened(self) -> set[str]:
        return {event["device"] for event in self.served.heard("opened")}


@pytest.fixture(scope="module")
def running(members: Members, model_folder: Callable[..., Path]) -> Iterator[Target]:
    bert = model_folder("bert")
    with serving(
        members, bert, {"limits.max_tokens": 256, "limits.max_parts": 4, "limits.idle_s": 3.0}
    ) as served:
        target = Target(members, served, queue_cloud.config(bert))
        target.serves_the_good_one()
        yield target


@pytest.fixture
def target(running: Target) -> Iterator[Target]:
    running.served.events.clear()
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    yield running
    assert resident_bytes("VmHWM") - before < MEMORY_BYTES
    running.serves_the_good_one()
    assert running.served.heard("load", device="tablet")[-1]["tokens"] == 0


# Who are you?


async def answered(port: int, certificate: Path | None) -> bool:
    """Whether one byte of HTTP/2 comes back."""
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        async with connected(port, tls(certificate)) as raw:
            await raw.say(open_stream(TALK))
            return await asyncio.wait_for(raw.reader.read(1), 5) != b""
    return False


STRANGERS = (
    "nobody",
    "a stranger",
    "a stranger called phone",
    "a stranger called hub",
    "tablet signed by phone",
    "a peer",
)


@pytest.mark.parametrize("who", STRANGERS)
def test_only_a_devices_certificate_gets_a_stream(target: Target, who: str, tmp_path: Path) -> None:
    certificate: Path | None = None
    if who == "tablet signed by phone":
        certificate = forged_by(target.members.key("phone"), "tablet", tmp_path)
    elif who == "a peer":
        certificate = target.members.key("north")
    elif who != "nobody":
        certificate = new_identity(who.rpartition(" ")[2], None, "device", tmp_path)[0]
    assert not asyncio.run(answered(target.port, certificate))
    assert target.opened == set()


def test_the_listed_certificate_gets_one(target: Target) -> None:
    """The attacker's tools work."""
    assert asyncio.run(answered(target.port, target.members.key("phone")))


def test_a_device_does_not_talk_to_another_member_in_the_clouds_place(
    target: Target, tmp_path: Path
) -> None:
    """Whoever holds a member's key, listening where the federation file says the cloud is."""
    federation = tmp_path / "federation.yaml"
    impostor = new_identity("hub", None, "cloud", tmp_path)  # the name, but not the key
    others = [
        target.members.folder / f"{name}.member.yaml" for name in ("phone", "north", "tablet")
    ]
    federation.write_text(federation_text([impostor[1], *others]))
    told: list[str] = []
    for name, key in {"hub": impostor[0], "north": target.members.key("north")}.items():
        false = GrpcNetwork(Identity.load(name, key, Federation.load(federation)),
            FederationFile(federation), None,
                            "127.0.0.1:0", kind=split_kind().as_bytes)  # fmt: skip
        elsewhere = tmp_path / name
        elsewhere.mkdir()
        with LoopThread() as loop:
            heard: list[str] = []

            async def talk(device: str, link: Any, heard: list[str] = heard) -> None:
                heard.append(device)

            serving_it = loop.start(false.serve(talk))
            until(lambda false=false: false.port is not None, "it to listen", PATIENCE_S)  # type: ignore[misc]
            true = Federation.load(target.members.federation)
            moved = target.members.federation.read_text().replace(
                target.members.address, f"127.0.0.1:{false.port}"
            )
            (elsewhere / "federation.yaml").write_text(moved)
            network = GrpcNetwork(Identity.load("phone", target.members.key("phone"), true),
                                  FederationFile(elsewhere / "federation.yaml"), ["hub"], None,
                                  split_kind().as_bytes,
                                  told.append)  # fmt: skip
            dialler = Dialler(network, loop, split_kind())
            with pytest.raises(ChannelDown):
                dialler.dial(lambda: bool(told))
            dialler.close()
            serving_it.cancel()
        assert (
            heard == []
            and "hub shows a certificate that the federation file here does not list" in told.pop()
        )


# A device with a good certificate and bad intentions


def begin(call: int = 1, part: int = 0, tokens: int = 4, width: int = 64) -> Begin:
    mask = np.packbits(np.ones(tokens, dtype=bool)).tobytes()
    return Begin(
        call, part, 1, tokens, mask, b"", True, None, b"", (), (), torch.zeros(tokens, width)
    )


def update(call: int = 1, unit: int = 0, shape: tuple[int, int] = (4, 192)) -> Values:
    return Values("update", call, 0, unit, torch.zeros(shape))


MISBEHAVIOUR: dict[str, tuple[list[SplitFrame], str]] = {
    "begin before open": ([begin()], "Begin before Open"),
    "values before open": ([update()], "Values before Open"),
    "drop before open": ([Drop(1)], "Drop before Open"),
    "a cloud's word": ([Opened(1, 1)], "Opened"),
    "done": ([Open(""), Done(1, 0)], "Done"),
    "another width": (
        [Open(""), begin(width=32)],
        "embedded tokens of width 32; the body takes 64",
    ),
    "a part twice": ([Open(""), begin(), begin()], "part 0 of call 1 was begun already"),
    "input from a device": (
        [Open(""), begin(), Values("input", 1, 0, 0, torch.zeros(4, 64))],
        "Values from a device",
    ),
}


@pytest.mark.parametrize("case", MISBEHAVIOUR)
def test_a_frame_out_of_place_ends_the_link(target: Target, case: str) -> None:
    frames, says = MISBEHAVIOUR[case]
    with target.members.dialler("phone") as phone:
        channel = phone.dial()
        for frame in frames:
            channel.send(Open(target.manifest) if isinstance(frame, Open) else frame)
        with pytest.raises(ChannelDown):
            while True:
                channel.receive(PATIENCE_S)
    target.refused(says)
    until(
        lambda: target.served.heard("load", device="phone", tokens=0),
        "its memory to be free",
        PATIENCE_S,
    )


def test_a_hoarder_holds_no_more_than_its_limits_and_not_for_long(target: Target) -> None:
    """Parts begun and never answered."""
    with target.members.dialler("phone") as phone:
        channel, _ = opened(phone, target.manifest)
        for call in range(1, 21):
            channel.send(begin(call, tokens=32))
            while call > 4 and not isinstance(said := channel.receive(PATIENCE_S), Failed):
                assert isinstance(said, Values)  # of those that are here
        assert len(target.served.heard("failed", why="tokens")) == 16
        target.serves_the_good_one()
        until(
            lambda: len(target.served.heard("failed", why="expired")) == 4,
            "the others to expire",
            PATIENCE_S,
        )
        assert len(target.served.heard("failed", device="phone")) == 20
        channel.send(begin(99))
        assert not channel.is_down


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "empty"), (b"\x80" * 100, "no frame"), (b"\xff" * 100_000, "no frame")],
    ids=["empty", "garbage", "much garbage"],
)
def test_what_is_no_frame_ends_the_link(target: Target, data: bytes, words: str) -> None:
    async def main() -> None:
        async with stream(target) as call:
            await call.write(data)
            assert await call.read() is grpc.aio.EOF

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    target.refused("phone: ")
    assert target.opened == set()


def test_an_oversized_frame_ends_the_link(target: Target) -> None:
    async def main() -> None:
        async with stream(target) as call:
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                await call.write(encode_split(begin(tokens=40_000), "float32"))
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


@contextlib.asynccontextmanager
async def stream(target: Target) -> Any:
    """A stream of gRPC's own, as phone, with nothing of dlora on its side."""
    federation = Federation.load(target.members.federation)
    identity = Identity.load("phone", target.members.key("phone"), federation)
    credentials = grpc.ssl_channel_credentials(
        federation.trusted(["hub"]), identity.key_pem, identity.certificate_pem
    )
    options = [("grpc.ssl_target_name_override", "hub")]
    async with grpc.aio.secure_channel(f"127.0.0.1:{target.port}", credentials, options) as channel:
        yield channel.stream_stream(TALK)()


@pytest.mark.parametrize("layer", ["TLS record", "HTTP/2 frame", "gRPC message"])
def test_a_flood_of_garbage(target: Target, layer: str) -> None:
    garbage = b"\xa5" * MIB
    opening = {
        "TLS record": b"\x16\x03\x01\xff\xff\x01\xff\xff\xff",
        "HTTP/2 frame": PREFACE + h2(4, 0, 0, b"") + b"\xff\xff\xff" + struct.pack(">BBI", 0, 0, 1),
        "gRPC message": open_stream(TALK) + h2(0, 0, 1, announced(1 << 30) + bytes(1000)),
    }[layer]
    piece = h2(0, 0, 1, garbage[:16384]) * 64 if layer == "gRPC message" else garbage
    taken = 0
    with socket.create_connection(("127.0.0.1", target.port), timeout=2) as plain:
        connection = (
            plain if layer == "TLS record" else tls(target.members.key("phone")).wrap_socket(plain)
        )
        with connection, contextlib.suppress(OSError):
            connection.sendall(opening)
            for taken in range(1024):  # noqa: B007
                connection.sendall(piece)
    assert taken < 512
    assert target.opened == set()


def test_a_slow_drip_holds_nothing_but_its_own_link(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlora.net.links.FIRST_FRAME_S", 0.5)

    async def main() -> None:
        async with connected(target.port, tls(target.members.key("phone"))) as raw:
            await raw.say(open_stream(TALK) + h2(0, 0, 1, announced(1000)))

            async def drip() -> None:
                while True:
                    await raw.say(h2(0, 0, 1, b"\x00"))
                    await asyncio.sleep(0.01)

            dripping = asyncio.ensure_future(drip())
            await asyncio.to_thread(target.serves_the_good_one)
            await asyncio.to_thread(target.refused, "phone: no frame within 0.5 s")
            dripping.cancel()
            await asyncio.wait({dripping})

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["TCP", "TLS with a certificate"])
def test_100_connections_at_once(target: Target, kind: str) -> None:
    """All held open; the good device is served all the same."""

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            context = None if kind == "TCP" else tls(target.members.key("phone"))

            async def connect() -> None:
                with contextlib.suppress(ssl.SSLError, ConnectionError):
                    await stack.enter_async_context(connected(target.port, context))

            await asyncio.gather(*(connect() for _ in range(100)))
            await asyncio.to_thread(target.serves_the_good_one)

    asyncio.run(main())
