"""A cloud, its devices, and threads that wait for one another over real TLS and in memory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dlora.errors import IdentityError
from dlora.identity.federation import Federation, FederationFile, federation_text, member_of_role
from dlora.identity.keys import Identity, new_identity
from dlora.net.channel import WINDOW_FRAMES, Channel, Dialler, LoopThread
from dlora.net.grpc import GrpcNetwork
from dlora.net.memory import MemoryHub
from dlora.net.transport import LinkDown, Network
from dlora.wire.frame import ChannelDown, FrameError, Link
from dlora.wire.split.codec import split_kind
from dlora.wire.split.frames import Done, Drop, Open, Refused, SplitFrame, Values

LIMIT_S = 10  # for what must happen at once; nothing waits that long


class Cloud:
    """What a cloud does with a link: keeps its channel, and hands what it hears to the test or
    back.
    """

    def __init__(self, max_frame_bytes: int = 1 << 24) -> None:
        self.kind = split_kind(max_bytes=max_frame_bytes)
        self.channels: queue.Queue[tuple[str, Channel]] = queue.Queue()
        self.heard: queue.Queue[tuple[str, SplitFrame]] = queue.Queue()
        self.on_frame: Callable[[str, SplitFrame], object] = lambda name, frame: self.heard.put(
            (name, frame)
        )
        self.refused: list[str] = []

    async def talk(self, name: str, link: Link) -> None:
        channel = Channel(link, self.kind)
        self.channels.put((name, channel))
        await channel.carry(lambda frame: self.on_frame(name, frame))

    def channel(self) -> Channel:
        return self.channels.get(timeout=LIMIT_S)[1]


class Stuck:
    """A link whose other end takes nothing, and from which nothing comes any more."""

    async def send(self, frame: bytes) -> None:
        await asyncio.sleep(LIMIT_S)

    async def receive(self) -> bytes:
        raise LinkDown("the link has ended")


def test_a_carrier_that_is_cancelled_while_it_flushes_leaves_nothing_behind() -> None:
    unheard: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: unheard.append(context)
        )
        channel = Channel(Stuck(), split_kind())
        channel.send(Drop(1))
        carrying = asyncio.create_task(channel.carry())
        await asyncio.sleep(0.05)  # reading has failed: it flushes
        carrying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await carrying
        gc.collect()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    gc.collect()
    assert not unheard


class InMemory:
    def __init__(self, folder: Path, loop: LoopThread) -> None:
        self.loop, self.cloud = loop, Cloud()
        self.hub = MemoryHub(
            {"box": ["phone"], "phone": ["box"]}, redial_s=0.01, kind=self.cloud.kind.as_bytes
        )
        self.start()

    def start(self) -> None:
        self.serving = self.loop.start(self.hub.network("box").serve(self.cloud.talk))

    def network(self, name: str) -> Network:
        return self.hub.network(name)


class Loopback:
    """A cloud, two devices and a peer; the federation file lists those named and says where the
    cloud is.
    """

    def __init__(self, folder: Path, loop: LoopThread, listed: str = "box phone") -> None:
        self.folder, self.loop, self.cloud, self.listed = folder, loop, Cloud(), listed.split()
        roles: dict[str, Any] = {
            "box": "cloud",
            "phone": "device",
            "tablet": "device",
            "friend": "peer",
        }
        for name, role in roles.items():
            new_identity(name, None, role, folder)
        self.path, self.address = folder / "federation.yaml", "127.0.0.1:1"
        self.write()
        self.start()

    def start(self) -> None:
        """The cloud, on any free port, which the federation file then names."""
        federation = FederationFile(self.path)
        identity = Identity.load("box", self.folder / "box.key", federation.current)
        kind = self.cloud.kind.as_bytes
        network = GrpcNetwork(
            identity, federation, None, "127.0.0.1:0", kind, self.cloud.refused.append
        )
        self.serving = self.loop.start(network.serve(self.cloud.talk))
        self.loop.start(network.bound.wait()).result(LIMIT_S)  # type: ignore[arg-type]
        self.address = f"127.0.0.1:{network.port}"
        self.write()

    def write(self, **roles: str) -> None:
        members = [
            yaml.safe_load((self.folder / f"{name}.member.yaml").read_text())
            for name in self.listed
        ]
        for member in members:
            member["role"] = roles.get(member["name"], member["role"])
            member["address"] = self.address if member["role"] == "cloud" else None
        new = self.path.with_suffix(".new")
        new.write_text(yaml.safe_dump({"members": members}))
        new.replace(self.path)

    def network(self, name: str) -> GrpcNetwork:
        """A device's. A stranger's own federation file lists it; the cloud's does not."""
        own = self.folder / f"{name}-federation.yaml"
        own.write_text(
            federation_text([self.folder / f"{member}.member.yaml" for member in ("box", name)])
        )
        tree = yaml.safe_load(own.read_text())
        for member in tree["members"]:
            member["address"] = self.address if member["name"] == "box" else None
        own.write_text(yaml.safe_dump(tree))
        federation = FederationFile(self.path if name in self.listed else own)
        identity = Identity.load(name, self.folder / f"{name}.key", federation.current)
        return GrpcNetwork(identity, federation, ["box"], None, kind=self.cloud.kind.as_bytes)


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    with LoopThread() as made:
        yield made


@pytest.fixture(params=[InMemory, Loopback], ids=["memory", "grpc"])
def net(request: pytest.FixtureRequest, tmp_path: Path, loop: LoopThread) -> InMemory | Loopback:
    made: InMemory | Loopback = request.param(tmp_path, loop)
    return made


@pytest.fixture
def grpc_net(tmp_path: Path, loop: LoopThread) -> Loopback:
    return Loopback(tmp_path, loop)


@pytest.fixture(autouse=True)
def quick_redial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlora.net.options.MAX_PAUSE_S", 0.05)
    monkeypatch.setattr("dlora.net.options.MIN_PAUSE_S", 0.01)


@contextlib.contextmanager
def dialling(net: InMemory | Loopback, name: str = "phone") -> Iterator[Dialler]:
    dialler = Dialler(net.network(name), net.loop, net.cloud.kind)
    try:
        yield dialler
    finally:
        dialler.close()


def give_up_after(limit_s: float) -> Callable[[], bool]:
    end = time.monotonic() + limit_s
    return lambda: time.monotonic() > end


def test_frames_go_both_ways_in_order_and_are_counted(net: InMemory | Loopback) -> None:
    # decoded in a thread
    big = Values("input", 1, 0, 0, torch.arange(1 << 20).view(1024, 1024).float())
    frames: list[SplitFrame] = [Open("{}"), Drop(1), big, Drop(2), big, Done(1, 0), Drop(3)]
    with dialling(net) as dialler:
        channel, back = dialler.dial(), net.cloud.channel()
        for frame in frames:
            channel.send(frame)
        heard = [net.cloud.heard.get(timeout=LIMIT_S) for _ in frames]
        assert {name for name, _ in heard} == {"phone"}
        assert [type(frame) for _, frame in heard] == [type(frame) for frame in frames]
        assert [frame.call for _, frame in heard if isinstance(frame, Drop)] == [1, 2, 3]
        assert torch.equal(heard[2][1].tensor, big.tensor)  # type: ignore[union-attr]
        for _, frame in heard:
            back.send(frame)
        got = [channel.receive(LIMIT_S) for _ in frames]
        assert [type(frame) for frame in got] == [type(frame) for frame in frames]
        assert torch.equal(got[4].tensor, big.tensor)
        sent, received = dialler.traffic.sent_bytes, dialler.traffic.received_bytes
        assert sent == received and sent["box"] > 2 * 4 << 20
        with pytest.raises(TimeoutError, match="no frame within 0.01 s"):
            channel.receive(0.01)


def test_both_ends_agree_on_the_wire(net: InMemory | Loopback) -> None:
    with dialling(net) as dialler:
        channel, back = dialler.dial(), net.cloud.channel()
        channel.kind = back.kind = split_kind("int8")
        channel.send(Values("input", 0, 0, 0, torch.ones(3, 100)))
        assert net.cloud.heard.get(timeout=LIMIT_S)[1].tensor.tolist() == [[1.0] * 100] * 3  # type: ignore[union-attr]
        assert 300 < dialler.traffic.sent_bytes["box"] < 400


def test_what_was_sent_before_closing_arrives(net: InMemory | Loopback) -> None:
    with dialling(net) as dialler:
        channel, back = dialler.dial(), net.cloud.channel()
        back.send(Refused("no room"))
        back.close()
        assert channel.receive(LIMIT_S) == Refused("no room")
        with pytest.raises(ChannelDown):
            channel.receive(LIMIT_S)
        with pytest.raises(ChannelDown):
            while True:
                channel.send(Drop(0))


def test_the_end_of_the_link_wakes_whoever_waits(net: InMemory | Loopback) -> None:
    """A device that receives and one that sends to a cloud that takes nothing."""
    stuck = threading.Event()
    net.cloud.on_frame = lambda name, frame: stuck.wait(LIMIT_S)  # the whole loop: nothing is read

    def send(channel: Channel) -> None:
        while True:
            channel.send(Drop(0))

    with dialling(net) as dialler, ThreadPoolExecutor(2) as threads:
        channel, back = dialler.dial(), net.cloud.channel()
        receiving, sending = threads.submit(channel.receive), threads.submit(send, channel)
        while len(channel._outgoing) < WINDOW_FRAMES:
            time.sleep(0.001)
        assert not receiving.done() and not sending.done()
        back.close()
        stuck.set()
        for waiting in (receiving, sending):
            assert isinstance(waiting.exception(LIMIT_S), ChannelDown)


def test_a_device_that_takes_nothing_loses_its_link(net: InMemory | Loopback) -> None:
    """Else its parts would stay in the cloud for ever: the link itself is alive, only nobody
    reads.
    """
    big = Values("input", 1, 0, 0, torch.ones(1024, 1024))
    with dialling(net) as dialler:
        channel, back = dialler.dial(), net.cloud.channel()
        with pytest.raises(ChannelDown):
            for _ in range(100):
                back.send(big, 0.3)
        assert back.is_down
        # the device hears of it once it has read what was under way
        with pytest.raises(ChannelDown):
            for _ in range(100):
                channel.receive(LIMIT_S)
        dialler.dial().send(Drop(7))  # and may come again
        assert net.cloud.heard.get(timeout=LIMIT_S)[1] == Drop(7)


def test_a_cloud_that_comes_back_is_dialled_again(net: InMemory | Loopback) -> None:
    with dialling(net) as dialler:
        channel = dialler.dial()
        net.cloud.channel()
        net.serving.cancel()
        with pytest.raises(ChannelDown):
            channel.receive(LIMIT_S)
        with pytest.raises(ChannelDown, match="given up"):
            dialler.dial(give_up_after(0))
        net.start()
        again = dialler.dial(give_up_after(LIMIT_S))
        assert again is not channel
        net.cloud.channel().send(Drop(7))
        assert again.receive(LIMIT_S) == Drop(7)


def test_dialling_again_ends_the_channel_before(net: InMemory | Loopback) -> None:
    with dialling(net) as dialler:
        one = dialler.dial()
        two = dialler.dial(give_up_after(LIMIT_S))
        assert one.is_down and not two.is_down
        with pytest.raises(ChannelDown):
            one.send(Drop(0))
        two.send(Drop(1))
        assert net.cloud.heard.get(timeout=LIMIT_S) == ("phone", Drop(1))


def test_what_a_conversation_refuses_ends_its_link(net: InMemory | Loopback) -> None:
    def refuse(name: str, frame: SplitFrame) -> None:
        raise ValueError("a frame out of turn")

    net.cloud.on_frame = refuse
    with dialling(net) as dialler:
        channel = dialler.dial()
        channel.send(Drop(0))
        with pytest.raises(ChannelDown):
            channel.receive(LIMIT_S)
    if isinstance(net, Loopback):
        assert net.cloud.refused == [
            "phone: the conversation failed: ValueError: a frame out of turn"
        ]


def test_rubbish_is_a_frame_error_at_either_end(net: InMemory | Loopback) -> None:
    with dialling(net) as dialler:
        channel, back = dialler.dial(), net.cloud.channel()
        for end in (channel, back):
            with end._changed:
                end._outgoing.append(b"rubbish")
                end._wake(end._to_write)
        with pytest.raises(FrameError, match="no frame|head"):
            channel.receive(LIMIT_S)
        with pytest.raises(ChannelDown):
            channel.receive(LIMIT_S)
    if isinstance(net, Loopback):
        assert "FrameError" in net.cloud.refused[0]


def test_a_frame_over_the_limit_is_not_sent(net: InMemory | Loopback) -> None:
    with dialling(net) as dialler:
        channel = dialler.dial()
        with pytest.raises(
            FrameError,
            match="a Values frame of 16777.* bytes; at most 16777216 are allowed, so fewer tokens",
        ):
            channel.send(Values("input", 0, 0, 0, torch.zeros(4096, 1024)))
        channel.send(Drop(1))
        assert net.cloud.heard.get(timeout=LIMIT_S) == ("phone", Drop(1))


def test_a_frame_over_the_other_ends_limit_ends_the_link(grpc_net: Loopback) -> None:
    dialler = Dialler(grpc_net.network("phone"), grpc_net.loop, split_kind(max_bytes=1 << 25))
    channel = dialler.dial()
    channel.send(Values("input", 0, 0, 0, torch.zeros(4096, 1024)))
    with pytest.raises(ChannelDown):
        channel.receive(LIMIT_S)
    dialler.close()
    assert grpc_net.cloud.heard.empty()


@pytest.mark.parametrize("where", ["dial", "receive", "send"])
def test_ctrl_c_gets_through(net: InMemory | Loopback, where: str) -> None:
    stuck = threading.Event()
    net.cloud.on_frame = lambda name, frame: stuck.wait(LIMIT_S)
    if where == "dial":
        net.serving.cancel()
    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.1, press)
    with dialling(net) as dialler:
        try:
            with pytest.raises(KeyboardInterrupt):
                channel = None if where == "dial" else dialler.dial()
                timer.start()
                while True:
                    if channel is None:
                        dialler.dial()
                    elif where == "receive":
                        channel.receive()
                    else:
                        channel.send(Drop(0))
            assert time.monotonic() - pressed[0] < 0.3
        finally:
            stuck.set()
            timer.join()


def test_a_failure_of_the_network_is_heard_by_whoever_dials(loop: LoopThread) -> None:
    class Failing:
        async def serve(self, talk: Any) -> None:
            raise OSError("no wire")

    dialler = Dialler(Failing(), loop, split_kind())  # type: ignore[arg-type]
    with pytest.raises(OSError, match="no wire"):
        dialler.dial(give_up_after(LIMIT_S))


# Who is let in


def test_a_device_that_is_listed_later_is_let_in(
    tmp_path: Path, loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlora.net.options.RELOAD_S", 0.01)
    net = Loopback(tmp_path, loop)
    with dialling(net, "tablet") as dialler:
        with pytest.raises(ChannelDown, match="given up"):
            dialler.dial(give_up_after(0.1))
        net.listed.append("tablet")
        net.write()
        dialler.dial(give_up_after(LIMIT_S)).send(Drop(1))
        assert net.cloud.heard.get(timeout=LIMIT_S) == ("tablet", Drop(1))


def test_two_devices_have_a_link_each_and_a_newer_one_replaces(
    tmp_path: Path, loop: LoopThread
) -> None:
    net = Loopback(tmp_path, loop, "box phone tablet")
    with (
        dialling(net, "phone") as phone,
        dialling(net, "tablet") as tablet,
        dialling(net, "phone") as other,
    ):
        one, two = phone.dial(), tablet.dial()
        one.send(Drop(1))
        two.send(Drop(2))
        heard = {net.cloud.heard.get(timeout=LIMIT_S) for _ in range(2)}
        assert heard == {("phone", Drop(1)), ("tablet", Drop(2))}
        other.dial()
        with pytest.raises(ChannelDown):
            one.receive(LIMIT_S)
        two.send(Drop(3))
        assert net.cloud.heard.get(timeout=LIMIT_S) == ("tablet", Drop(3))


def test_a_peer_is_not_let_into_a_cloud(tmp_path: Path, loop: LoopThread) -> None:
    net = Loopback(tmp_path, loop, "box phone friend")
    with dialling(net, "friend") as dialler, pytest.raises(ChannelDown, match="given up"):
        dialler.dial(give_up_after(0.3))
    with dialling(net) as dialler:  # and it still serves
        dialler.dial(give_up_after(LIMIT_S))
    assert net.cloud.channels.get(timeout=LIMIT_S)[0] == "phone"


def test_a_device_that_becomes_a_peer_is_let_in_no_more(
    tmp_path: Path, loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the handler, whose word counts before TLS knows."""
    monkeypatch.setattr("dlora.net.options.RELOAD_S", 1000)
    net = Loopback(tmp_path, loop)
    with dialling(net) as dialler:
        channel = dialler.dial()
        net.write(phone="peer")
        channel.send(Drop(0))
        with pytest.raises(ChannelDown):
            channel.receive(LIMIT_S)
        with pytest.raises(ChannelDown, match="given up"):
            dialler.dial(give_up_after(0.3))
    assert net.cloud.refused[0] == "phone: its certificates in the federation file have changed"
    assert "'phone' is not a device in the federation file of box" in net.cloud.refused[1]


def test_who_has_another_role_is_named(grpc_net: Loopback) -> None:
    federation = Federation.load(grpc_net.path)
    assert member_of_role(federation, "box", "cloud").name == "box"
    with pytest.raises(
        IdentityError, match=r"phone is a device in .*, not a cloud; name one .* role is cloud: box"
    ):
        member_of_role(federation, "phone", "cloud")
    with pytest.raises(IdentityError, match="role is peer: none"):
        member_of_role(federation, "box", "peer")


@pytest.mark.parametrize(
    ("name", "lets_in"), [("phone", True), ("tablet", False), ("friend", False)]
)
def test_a_health_check_is_answered_to_devices_only(
    grpc_net: Loopback, name: str, lets_in: bool
) -> None:
    async def check() -> int:
        key, box = (
            (grpc_net.folder / f"{name}.key").read_bytes(),
            Federation.load(grpc_net.path).trusted(["box"]),
        )
        certificate = Federation.load(grpc_net.folder / "all.yaml").trusted([name])
        options = [("grpc.ssl_target_name_override", "box")]
        credentials = grpc.ssl_channel_credentials(box, key, certificate)
        async with grpc.aio.secure_channel(grpc_net.address, credentials, options) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(
                health_pb2.HealthCheckRequest(service="dlora.split.Cloud"), timeout=LIMIT_S
            )
            return int(answer.status)

    members = [
        grpc_net.folder / f"{member}.member.yaml" for member in ("box", "phone", "tablet", "friend")
    ]
    (grpc_net.folder / "all.yaml").write_text(federation_text(members))
    if lets_in:
        assert asyncio.run(check()) == health_pb2.HealthCheckResponse.SERVING
    else:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            asyncio.run(check())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
