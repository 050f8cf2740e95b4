"""A cloud, its devices, and threads that wait for one another over real TLS and in memory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dlora.net.channel import WINDOW_FRAMES, Channel, Dialler
from dlora.net.loop_thread import LoopThread
from dlora.wire.frame import ChannelDown, FrameError
from dlora.wire.split.codec import split_kind
from dlora.wire.split.frames import Done, Drop, Open, Refused, SplitFrame, Values
from kit.channels import LIMIT_S, InMemory, Loopback, Stuck, dialling, give_up_after


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
