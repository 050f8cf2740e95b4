"""Who gets a channel to a cloud: listed devices, each one; health checks too."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dlora.errors import IdentityError
from dlora.identity.federation import Federation, federation_text, member_of_role
from dlora.net.loop_thread import LoopThread
from dlora.wire.frame import ChannelDown
from dlora.wire.split.frames import Drop
from kit.channels import LIMIT_S, Loopback, dialling, give_up_after


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
