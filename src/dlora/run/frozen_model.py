"""How a device's half reaches the frozen model: in a cloud, or in this process."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal

import psutil

from dlora.config.cloud import CloudConfig
from dlora.config.run import Config
from dlora.errors import CloudError, ConfigError, IdentityError, Interrupted
from dlora.events.kinds import CloudNews, Phase
from dlora.events.log import RunLog
from dlora.events.timed import ConnectionRefused
from dlora.identity.federation import Federation, FederationFile
from dlora.identity.keys import Identity
from dlora.net.channel import Channel, Dialler, WatchedChannel
from dlora.net.grpc import GrpcNetwork
from dlora.net.listen_address import certificate_teller
from dlora.net.loop_thread import LoopThread
from dlora.net.memory import MemoryHub
from dlora.run.prepare import Prepared
from dlora.split.cloud.body import load_body
from dlora.split.cloud.limits import Budget, Limits
from dlora.split.cloud.session import Session
from dlora.split.device.half import Half
from dlora.wire.frame import ChannelDown, Link
from dlora.wire.split.codec import split_kind

CLOUD, DEVICE = "cloud", "device"  # names of both halves in one process
# Seconds of waiting before the first message. Each next message comes after four times as long, but
# at most LAST_WORD_S after the one before.
FIRST_WORD_S, LAST_WORD_S = 1.0, 300.0
OWN_MEMORY = 0.5  # fraction of the free memory, for the body's activations

# the kinds of news that `far_cloud` tells
CloudWord = Literal[
    "cloud-lost", "cloud-away", "cloud-silent", "cloud-back", "connection-refused", "certificate"
]


@contextmanager
def far_cloud(
    half: Half,
    config: Config,
    identity: Identity,
    federation: FederationFile,
    tell: Callable[[CloudWord, str], object],
    give_up: Callable[[], bool],
    running: LoopThread | None = None,
) -> Iterator[Callable[[], int]]:
    """Link ``half`` to the cloud that the config names; yields a function that returns the bytes so
    far, both ways.

    ``tell(event, reason)`` receives the events of the link: connection-refused, certificate,
    cloud-away, cloud-lost, cloud-silent, cloud-back. When ``give_up`` returns True, a wait for the
    cloud ends with Interrupted. ``running``: the loop in which the link runs, if there is one
    already; gRPC's events of one loop may come to another, which fails if the first has ended.
    ``half`` may be deleted inside the context, and cannot be used
    after it.
    """
    assert config.split is not None
    cloud = federation.current.members[config.split.cloud]
    with LoopThread() if running is None else nullcontext(running) as loop:
        network = GrpcNetwork(
            identity,
            federation,
            [config.split.cloud],
            None,
            split_kind().as_bytes,
            partial(tell, "connection-refused"),
            partial(tell, "certificate"),
        )
        dialler = Dialler(network, loop, split_kind(config.split.wire))
        was_linked = over = False

        def gives_up() -> bool:
            return over or give_up()

        def dial() -> Channel:
            nonlocal was_linked
            if over:
                raise ConfigError("this model is disconnected; make another with dlora.connect")
            if was_linked:
                tell("cloud-lost", "the link has ended; what was under way is done again")
            try:
                waits = partial(tell, "cloud-away")
                channel = dialler.dial(_saying(waits, f"{cloud.name} at {cloud.address}", gives_up))
            except ChannelDown:
                raise Interrupted(
                    f"{identity.name} stopped while its cloud was away; what was saved stands"
                ) from None
            if was_linked:
                tell("cloud-back", "there is a link again")
            was_linked = True
            return channel

        silence_s = config.split.silence_s

        def silent() -> None:
            tell(
                "cloud-silent",
                f"the link lives, but no answer came for {silence_s:g} s; it is waited for",
            )

        def watched(channel: Channel) -> WatchedChannel:
            return WatchedChannel(
                channel, silence_s, silent, lambda: tell("cloud-back", "it answers again"), gives_up
            )

        cloud_bytes = _link(half, config, dialler, dial, watched)
        del half
        try:
            yield cloud_bytes
        finally:
            over = True
            dialler.close()


def _saying(
    tell: Callable[[str], object], cloud: str, give_up: Callable[[], bool]
) -> Callable[[], bool]:
    """Wrap ``give_up``, which a wait for a link calls some times a second.

    From time to time the wrapper also tells since when there is no link.
    """
    began_at, clock, due_s = time.monotonic(), time.strftime("%H:%M:%S"), FIRST_WORD_S

    def look() -> bool:
        nonlocal due_s
        if time.monotonic() - began_at >= due_s:
            due_s = min(4 * due_s, due_s + LAST_WORD_S)
            tell(
                f"no link to {cloud} since {clock}; start dlora cloud there, or stop the wait with"
                " Ctrl-C"
            )
        return give_up()

    return look


@contextmanager
def own_cloud(half: Half, config: Config) -> Iterator[Callable[[], int]]:
    """Run the body in this process, at the other end of a link in memory.

    Yields a function that returns the bytes so far, both ways.
    """
    assert config.split is not None
    kind = split_kind(config.split.wire)
    frame = {
        name.removeprefix(half.model.body.prefix): tensor
        for name, tensor in half.model.directions.items()
    }
    body = load_body(CloudConfig.parse({"model": config.model, "device": config.device}), frame)
    limits = Limits(max_tokens=1 << 20, max_parts=256, idle_s=3600.0)
    budget = Budget(int(OWN_MEMORY * psutil.virtual_memory().available))
    with LoopThread() as loop:
        hub = MemoryHub({CLOUD: [DEVICE], DEVICE: [CLOUD]}, kind.as_bytes)

        async def talk(name: str, link: Link) -> None:
            channel = Channel(link, kind)
            session = Session(name, body, limits, budget, channel.send)
            try:
                await channel.carry(session.hear)
            finally:
                session.close()

        serving = loop.start(hub.network(CLOUD).serve(talk))
        dialler = Dialler(hub.network(DEVICE), loop, kind)
        try:
            yield _link(half, config, dialler, dialler.dial, lambda channel: channel)
        finally:
            dialler.close()
            serving.cancel()


def teller(log: RunLog, cloud: str) -> Callable[[CloudWord, str], None]:
    """A function that puts the events of `far_cloud` into the log and on the terminal."""
    waiting = f"waiting for the cloud {cloud}"

    told_of_certificate = certificate_teller(log)

    def tell(event: CloudWord, reason: str) -> None:
        if event == "certificate":
            told_of_certificate(reason)
            return
        if event == "connection-refused":
            log.emit(ConnectionRefused(event=event, reason=reason))
        else:
            log.emit(CloudNews(event=event, reason=reason))
        if event != "cloud-back":
            text = waiting if event == "cloud-lost" else f"{waiting}: {reason}"
            log.tick(Phase(event="phase", text=text))

    return tell


def _link(
    half: Half,
    config: Config,
    dialler: Dialler,
    dial: Callable[[], Channel],
    watched: Callable[[Channel], Channel | WatchedChannel],
) -> Callable[[], int]:
    assert config.split is not None
    half.link(lambda: watched(dial()), config.split.pipeline, time.sleep)
    traffic = dialler.traffic
    return lambda: sum(traffic.sent_bytes.values()) + sum(traffic.received_bytes.values())


def reach_cloud(log: RunLog, prepared: Prepared) -> None:
    """Wait for the cloud. Raises CloudError if it refuses this device, or if one text has more
    tokens than it takes.
    """
    assert prepared.half is not None and prepared.config.split is not None
    waiting = f"waiting for the cloud {prepared.config.split.cloud}"
    log.tick(Phase(event="phase", text=waiting))
    limits = prepared.half.open()
    data = prepared.data
    options = [option for choice in data.choices for option in choice.options]
    longest = max(
        len(row.input_ids)
        for rows in (*data.peers.values(), data.evaluation, options)
        for row in rows
    )
    if longest > limits.max_tokens:
        raise CloudError(
            f"a text of {longest} tokens is more than the cloud takes, {limits.max_tokens}: lower"
            " data.max_length, or raise limits.max_tokens there"
        )


def check_halves(config: Config, name: str, listed: Federation) -> None:
    """Raise ConfigError or IdentityError unless ``name`` is a device and ``config.split.cloud`` is
    a cloud with an address.
    """
    if config.split is None:
        raise ConfigError(
            "split is missing; a device needs the name of its cloud, such as split: {cloud: hub}"
        )
    if listed.member(name).role != "device":
        raise IdentityError(
            f"{name} is a {listed.member(name).role} in {listed.source}; a device needs its own"
            " name: dlora identity new NAME --role device"
        )
    cloud = listed.members.get(config.split.cloud)
    if cloud is None:
        near = difflib.get_close_matches(config.split.cloud, listed.members, n=1)
        hint = (
            f"; did you mean {near[0]}?"
            if near
            else f"; it lists {', '.join(sorted(listed.members))}"
        )
        raise ConfigError(f"split.cloud {config.split.cloud} is not in {listed.source}{hint}")
    if cloud.role != "cloud" or cloud.address is None:
        what = f"a {cloud.role}" if cloud.role != "cloud" else "a cloud without an address"
        raise ConfigError(
            f"split.cloud {cloud.name} is {what} in {listed.source}; name a cloud that can be"
            " dialled"
        )
