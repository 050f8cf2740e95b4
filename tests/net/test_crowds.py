"""Members and strangers who come too often, too many or too fast: they are slowed, and the others
are served meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import pytest

from dlora.identity.federation import federation_text
from dlora.net.doorman import Doorman, place_of
from dlora.net.options import LINKS_AT_ONCE, LINKS_PER_S, MAX_CONNECTIONS, MAX_STRANGERS, QUEUE_S
from dlora.net.rates import Rate, Told
from dlora.wire.frame import ChannelDown
from dlora.wire.peer.codec import PEERS, encode_frame
from dlora.wire.peer.frames import Status
from kit import queue_cloud
from kit.attackers import MIB, Target, channel, connected, open_stream, tls
from kit.loopback import run
from kit.processes import until
from kit.serving_cloud import PATIENCE_S, Members, manifest_of, opened, serving


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(tmp_path)


# Struck off


def test_a_member_struck_off_that_stays_silent_loses_its_link(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field case 37: not one frame comes from it after the file has changed."""
    monkeypatch.setattr("dlora.net.options.RELOAD_S", 0.05)

    async def main() -> None:
        async with target.listening() as port, channel(target, port) as call:
            await call.write(encode_frame(Status(5)))
            assert await call.read() == encode_frame(Status(5))
            target.net.path.write_text(
                federation_text([tmp_path / f"{name}.member.yaml" for name in "ac"])
            )
            target.net.address("a", f"127.0.0.1:{port}")
            assert (
                await target.refused.get()
                == "b: its certificates in the federation file have changed"
            )
            with contextlib.suppress(grpc.RpcError):
                assert await call.read() is grpc.aio.EOF
            assert call.done()

    run(main())


def test_a_device_struck_off_gives_its_place_to_another(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    """Field case 37: of a cloud that takes one device, and the silent one that held the place is in
    the file no more.
    """
    members, bert = Members(tmp_path), model_folder("bert")
    manifest = manifest_of(queue_cloud.device_half(queue_cloud.config(bert)))
    with (
        serving(members, bert, {"limits.max_devices": 1}) as served,
        members.dialler("phone") as phone,
    ):
        held, _ = opened(phone, manifest)
        left = [tmp_path / f"{name}.member.yaml" for name in ("hub", "tablet", "north", "attic")]
        members.federation.write_text(federation_text(left))
        with pytest.raises(ChannelDown):
            held.receive(PATIENCE_S)
        until(
            lambda: served.heard("closed", device="phone"),
            "the phone's place to be free",
            PATIENCE_S,
        )
        with members.dialler("tablet") as tablet:
            opened(tablet, manifest)


# Too fast, too often


def test_a_flood_of_status_is_read_at_a_pace(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field case 40: what came of it in two seconds is what the budget of one member allows; others
    are served at once.

    With a tenth of the real budget: a flood from this very process is slow itself.
    """
    slow = replace(
        PEERS, frames_per_s=PEERS.frames_per_s / 10, frames_at_once=PEERS.frames_at_once // 10
    )
    monkeypatch.setattr(target.net, "network", partial(target.net.network, kind=slow))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with target.listening() as port, channel(target, port) as call:

            async def pour() -> None:
                while True:
                    await call.write(encode_frame(Status(5)))

            async def drain() -> None:
                while await call.read() is not grpc.aio.EOF:
                    pass

            began_at = loop.time()
            pouring, draining = asyncio.ensure_future(pour()), asyncio.ensure_future(drain())
            while len(target.heard["b"]) < slow.frames_at_once:
                await asyncio.sleep(0.01)
            await target.serves_the_good_one()
            while loop.time() < began_at + 2:
                await asyncio.sleep(0.01)
            assert len(target.heard["b"]) > slow.frames_at_once  # it is slowed, not ended
            assert (
                len(target.heard["b"])
                <= slow.frames_at_once + slow.frames_per_s * (loop.time() - began_at) + 2
            )
            for task in (pouring, draining):
                task.cancel()
            await asyncio.wait({pouring, draining})

    run(main(), 40)


@pytest.mark.slow
def test_a_member_that_links_again_and_again_is_slowed(target: Target) -> None:
    """Field case 40: 16 of them at once, who come back as soon as they were let in; the good
    neighbour comes in meanwhile.
    """

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with target.listening() as port:
            began_at = loop.time()

            async def come_and_go() -> None:
                while loop.time() < began_at + 5:
                    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                        async with connected(port, tls(target.key("b"))) as raw:
                            await raw.say(open_stream())
                            async with asyncio.timeout(10):
                                while (
                                    b"accepted" not in (data := await raw.reader.read(MIB)) and data
                                ):
                                    pass

            comers = [asyncio.ensure_future(come_and_go()) for _ in range(16)]
            await asyncio.sleep(1)
            await target.serves_the_good_one()
            await asyncio.wait(comers)
            allowed = LINKS_AT_ONCE + LINKS_PER_S * (loop.time() - began_at + QUEUE_S)
            assert LINKS_AT_ONCE <= target.linked.count("b") <= allowed + 1
            reason = await target.refused.get()
            assert reason == "b: it dials too often, 1 times a second are taken"

    run(main(), 40)


def test_a_rate_makes_up_for_what_was_taken() -> None:
    """Field case 40: the arithmetic."""
    rate = Rate(per_s=2.0, burst=3, queue_s=1.0)
    assert [rate.take(10.0) for _ in range(6)] == [0, 0, 0, 0.5, 1.0, None]
    assert rate.take(10.5) == 1.0
    assert rate.take(100.0) == 0
    told = Told(per_s=1.0, burst=2)
    said = [told.line(f"line {number}", 0.0) for number in range(5)]
    assert said == ["line 0", "line 1", None, None, None]
    assert told.line("line 5", 1.0) == "line 5 (3 more lines were left out before this one)"
    assert told.line("line 6", 2.0) == "line 6"


# Too many


@contextlib.asynccontextmanager
async def held_open(port: int, count: int) -> AsyncIterator[list[int]]:
    """Connections of strangers who say nothing and come back at once when they are hung up on; how
    often that was.
    """
    hung_up = [0]

    async def hold() -> None:
        while True:
            with contextlib.suppress(OSError):
                async with connected(port, None) as raw:
                    await raw.reader.read()
            hung_up[0] += 1
            await asyncio.sleep(0.05)

    holding = [asyncio.ensure_future(hold()) for _ in range(count)]
    try:
        yield hung_up
    finally:
        for task in holding:
            task.cancel()
        await asyncio.wait(holding)


def test_strangers_who_fill_the_room_do_not_keep_a_member_out(target: Target) -> None:
    """Field case 40: more connections than there is room for, renewed for as long as it lasts;
    members come in six times, and a link that was up before stays.
    """

    async def main() -> None:
        async with target.listening() as port, channel(target, port) as call:
            await call.write(encode_frame(Status(1)))
            assert await call.read() == encode_frame(Status(1))
            async with held_open(port, MAX_CONNECTIONS + 20) as hung_up:
                while hung_up[0] < MAX_CONNECTIONS:
                    await asyncio.sleep(0.01)
                for _ in range(6):
                    # it dials again where a stranger was faster
                    await target.serves_the_good_one(within_s=20)
            await call.write(encode_frame(Status(2)))
            assert await call.read() == encode_frame(Status(2))

    run(main(), 60)


def test_the_doorman_hangs_up_on_the_oldest_and_on_no_member() -> None:
    """Field case 40."""
    door = Doorman(room=20)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = server.getsockname()[1]

        def come() -> tuple[socket.socket, socket.socket]:
            near = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            far = stack.enter_context(server.accept()[0])
            near.setblocking(False)
            return near, far

        member = come()
        host, its_port = member[1].getpeername()
        stack.enter_context(door.let_in(f"ipv4:{host}:{its_port}"))
        first = [come() for _ in range(15)]
        assert door.look(port) == 0
        second = [come() for _ in range(15)]
        assert door.look(port + 1) == 0
        assert door.look(port) == 10

        def ended(pair: tuple[socket.socket, socket.socket]) -> bool:
            try:
                return pair[0].recv(1) == b""
            except BlockingIOError:
                return False

        assert sum(map(ended, first)) == 10 and not any(map(ended, [*second, member]))
        # those hung up on are still open files of this test's
        assert door.look(port) <= 10 < MAX_STRANGERS


@pytest.mark.parametrize(
    ("peer", "place"),
    [
        ("ipv4:10.0.0.1:51000", ("10.0.0.1", 51000)),
        ("ipv6:%5B::1%5D:51000", ("::1", 51000)),
        ("ipv6:[::ffff:10.0.0.1]:51000", ("10.0.0.1", 51000)),
        ("unix:/a/b", None),
    ],
)
def test_what_grpc_says_of_a_caller_is_understood(peer: str, place: tuple[str, int] | None) -> None:
    assert place_of(peer) == place
