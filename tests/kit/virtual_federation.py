"""Peers on random quadratics in one process and in virtual time, who can be killed at any write and
any frame.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dlora.config.peers import PeersSection
from dlora.decentralized.gossip import trained
from dlora.decentralized.mixing import build_rule
from dlora.decentralized.peer.exchange import Exchange
from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.life import PeerGossip, Progress
from dlora.decentralized.peer.messages_on_disk import round_of
from dlora.decentralized.peer.patience import Patience
from dlora.decentralized.topology import Topology, build_topology
from dlora.events.neighbours import NeighbourEvent
from dlora.lora.factors import Factors
from dlora.net.memory import MemoryHub, MemoryNetwork
from dlora.net.transport import LinkDown
from dlora.wire.frame import FrameError
from dlora.wire.peer.codec import PEERS
from dlora.wire.peer.frames import Frame
from dlora.wire.tensors import Expected, decode_tensors, encode, message_num_bytes

SIZE = 3
PATIENCE = Patience(silence_s=60, round_limit_s=600)


class Killed(BaseException):
    """This peer's process is gone: nothing after this line happened."""


def expected(message: str) -> Expected:
    """What a message of that name holds."""
    if round_of(message) is None and message not in ("sum", "average"):
        return {}
    tensors: Expected = {"x": (torch.float64, (SIZE,))}
    return (
        {**tensors, "num_peers": (torch.float64, (1,))}
        if message in ("sum", "average")
        else tensors
    )


class Signer:
    """Signatures of equal length that nobody has to wait for; who signs in another's name is not
    tested with these.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def sign(self, statement: bytes) -> bytes:
        return hmac.digest(self.name.encode(), statement, "sha512")

    def is_signed(self, name: str, statement: bytes, signature: bytes) -> bool:
        return hmac.digest(name.encode(), statement, "sha512") == signature


class World:
    """n peers; ``rate`` 0 trains nothing, so that the sum over peers is what it was.

    ``rounds_a_checkpoint``: after how many rounds a peer writes its factors to disk. `dlora peer`
    does it after each; a script with `dlora.Peer` when it makes a checkpoint of its own.
    """

    rounds_a_checkpoint = 1

    def __init__(
        self,
        folder: Path,
        topology: str = "ring",
        num_peers: int = 4,
        rounds: int = 3,
        rate: float = 0.0,
    ) -> None:
        self.folder, self.rounds, self.rate = folder, rounds, rate
        names = [chr(ord("a") + index) for index in range(num_peers)]
        section = PeersSection.model_validate({"count": num_peers, "topology": {"kind": topology}})
        self.topology: Topology = build_topology(section.topology, None, names)
        self.rule = build_rule(section)
        self.hub = MemoryHub({name: self.neighbours(name) for name in names}, PEERS)
        generator = torch.Generator().manual_seed(7)
        self.targets = {
            name: torch.randn(1, SIZE, generator=generator, dtype=torch.float64) for name in names
        }
        self.start = {
            name: torch.randn(1, SIZE, generator=generator, dtype=torch.float64) for name in names
        }
        self.commits: dict[str, tuple[Tensor, Progress]] = {}  # each peer's disk, beside its ledger
        self.results: dict[str, tuple[Tensor, int]] = {}
        self.rounds_now: dict[str, int] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.story: list[tuple[float, str, str, dict[str, Any]]] = []
        # asked before every frame and write
        self.fault: Callable[[str, str], bool] = lambda name, what: False
        # before it is sent
        self.on_frame: Callable[[World, str, str, Frame], None] = lambda *told: None
        self.liar: Liar | None = None
        self.lag_s: dict[str, float] = {}  # how much longer every frame of a peer takes
        # how much longer a peer's local steps of a round take
        self.steps_s: dict[tuple[str, int], float] = {}
        self.trained: dict[str, list[int]] = {}
        # what ended a conversation and is no fault: a mistake in the protocol
        self.broken: list[BaseException] = []
        self.manifests = dict.fromkeys(names, '{"r":8}')
        self.catch_up_after = 10

    @property
    def names(self) -> tuple[str, ...]:
        return self.topology.names

    def neighbours(self, name: str) -> list[str]:
        return self.topology.neighbour_names(name)

    # Starting and stopping

    def begin(self, name: str) -> asyncio.Task[None]:
        self.tasks[name] = asyncio.create_task(self._live(name))
        return self.tasks[name]

    async def run(
        self, plan: Callable[[World], Any] | None = None, without: str = "", limit_s: float = 1e5
    ) -> None:
        """Start everybody but ``without``, let ``plan`` happen, and wait until all that live are
        done.
        """
        for name in self.names:
            if name != without:
                self.begin(name)
        if plan is not None:
            await plan(self)
        async with asyncio.timeout(limit_s):
            while not all(task.done() for task in self.tasks.values()):
                await asyncio.wait([task for task in self.tasks.values() if not task.done()])
        for task in self.tasks.values():
            if not task.cancelled():
                task.result()

    def kill(self, name: str) -> None:
        self.tasks[name].cancel()

    async def _live(self, name: str) -> None:
        network = FaultyNetwork(self, name)
        ledger = self.make_ledger(name)
        start, progress = self.commits.get(name, (self.start[name], Progress()))
        factors: Factors = {"x": start.clone()}
        exchange = Exchange(
            name=name,
            manifest=self.manifests[name],
            manifest_hash=self.manifests[name].encode().hex().ljust(64, "0")[:64],
            ledger=ledger,
            neighbours=self.neighbours(name),
            patience=PATIENCE,
            messages=self,
            check=lambda neighbour, message, path: self.decode(message, path),
            report=partial(self._report, name),
            signatures=Signer(name),
        )

        older: list[Progress] = []  # of the checkpoint before the last

        def commit(progress: Progress) -> None:
            self._ask(name, "commit")
            done = progress.rounds_done
            if done % self.rounds_a_checkpoint == 0 or done == self.rounds:
                older[:] = [self.commits[name][1]] if name in self.commits else []
                self.commits[name] = (factors["x"].clone(), Progress(**vars(progress)))

        async def live() -> tuple[Factors, int]:
            await gossip.join()
            while gossip.has_rounds_left:
                await gossip.begin_round()
                round = gossip.progress.rounds_done
                names = trained(gossip.factors, gossip.rule, round)
                self.rounds_now[name] = round
                self.trained.setdefault(name, []).append(round)
                await asyncio.sleep(
                    1.0 + 0.1 * self.names.index(name) + self.steps_s.pop((name, round), 0.0)
                )
                factors["x"] -= self.rate * (factors["x"] - self.targets[name])
                await gossip.mix(names)
                for progress in older:
                    await gossip.confirm(progress)
            return await gossip.finish()

        gossip = PeerGossip(
            name=name,
            factors=factors,
            topology=self.topology,
            rule=self.rule,
            ledger=ledger,
            exchange=exchange,
            messages=self,
            rounds=self.rounds,
            catch_up_after=self.catch_up_after,
            standing=lambda: factors,
            commit=commit,
            skip=lambda rounds: None,
            clock=asyncio.get_running_loop().time,
            progress=Progress(**vars(progress)),
        )
        serving = asyncio.create_task(network.serve(exchange.talk))
        life = asyncio.create_task(live())
        try:
            ends: set[asyncio.Future[Any]] = {serving, life, exchange.failed}
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                result = task.result()
                assert result is not None
                self.results[name] = (result[0]["x"], result[1])
        except Killed:
            pass
        finally:
            network.dead = True
            for task in (serving, life):
                task.cancel()
            try:
                await asyncio.gather(serving, life, return_exceptions=True)
            finally:
                ledger.close()

    def make_ledger(self, name: str) -> FaultyLedger:
        """The ledger of a peer that begins."""
        return FaultyLedger(self, name)

    def heard(self, name: str, event: str, fields: dict[str, Any]) -> None:
        """What a peer reports, when it does."""

    def _report(self, name: str, event: NeighbourEvent) -> None:
        fields = {key: value for key, value in event.items() if key != "event"}
        self.story.append((asyncio.get_running_loop().time(), name, event["event"], fields))
        self.heard(name, event["event"], fields)

    def _ask(self, name: str, what: str) -> None:
        if self.fault(name, what):
            self.tasks[name].cancel()
            raise asyncio.CancelledError

    def sizes(self, message: str) -> range:
        known = expected(message) and (round_of(message) or 0) < self.rounds
        num_bytes = message_num_bytes(expected(message))
        return range(num_bytes, num_bytes + 1) if known else range(0)

    @staticmethod
    def encode(message: str, tensors: Mapping[str, Tensor]) -> bytes:
        return encode({name: tensors[name][0] for name in expected(message)}, torch.float64)

    @staticmethod
    def decode(message: str, path: Path) -> dict[str, Tensor]:
        return {
            name: tensor.unsqueeze(0)
            for name, tensor in decode_tensors(path, expected(message)).items()
        }

    # What must hold

    def ledger(self, name: str) -> set[tuple[int, str]]:
        ledger = Ledger(self.folder / name)
        ledger.close()
        return ledger.committed()

    def story_of(self, name: str, event: str) -> list[dict[str, Any]]:
        """The fields of a peer's events of one kind."""
        return [fields for _, who, what, fields in self.story if (who, what) == (name, event)]

    def doubts(self) -> list[list[int]]:
        """The rounds in which each peer is in doubt."""
        return [
            [round for rounds in doubts.values() for round in rounds]
            for doubts in self.doubts_with()
        ]

    def doubts_with(self) -> list[dict[str, list[int]]]:
        """For each peer, neighbour -> the rounds in doubt with it."""
        ledgers = [Ledger(self.folder / name) for name in self.names]
        for ledger in ledgers:
            ledger.close()
        return [
            {other: rounds for other in self.names if (rounds := ledger.in_doubt(other))}
            for ledger in ledgers
        ]

    def total(self) -> np.ndarray:
        """Of what the peers have committed; those that never did are where they started."""
        return sum(
            self.commits.get(name, (self.start[name], None))[0] for name in self.names
        ).numpy()  # type: ignore[union-attr]

    def check_ledgers(self) -> int:
        """Both ends of every edge know the same commits, and nothing is in doubt; returns how many
        there were.
        """
        known = {name: self.ledger(name) for name in self.names}
        for one, two in itertools.combinations(self.names, 2):
            here = {round for round, other in known[one] if other == two}
            there = {round for round, other in known[two] if other == one}
            assert here == there, f"{one} and {two}: {sorted(here)} and {sorted(there)}"
        assert not any(self.doubts()), self.doubts()
        return sum(len(edges) for edges in known.values()) // 2


class FaultyLedger(Ledger):
    """A ledger whose every write may be the last thing before the kill, or be missed by it."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        super().__init__(world.folder / name)

    def keep(self, name: str, content: bytes) -> Any:
        self.world._ask(self.name, "keep")
        return super().keep(name, content)

    def arrived(self, neighbour: str, name: str, partial: Path) -> None:
        self.world._ask(self.name, "arrived")
        super().arrived(neighbour, name, partial)

    def record(self, round: int, neighbour: str, state: Any, *more: Any) -> None:
        self.world._ask(self.name, "before " + state)
        super().record(round, neighbour, state, *more)
        self.world._ask(self.name, "after " + state)


class Liar(Protocol):
    """A member that runs the program with frames of its own in between."""

    name: str

    def tells(self, there: str, frame: Frame) -> Iterable[Frame]:
        """What it sends in place of ``frame``."""

    def answers(self, there: str, frame: Frame) -> Iterable[Frame]:
        """What it sends when ``frame`` comes, beside what its program does."""


class FaultyNetwork(MemoryNetwork):
    """A network that is silent once its peer is dead, and asks before each frame."""

    dead = False

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world.hub, name)
        self.world = world

    async def serve(self, talk: Any) -> None:
        async def faulty(neighbour: str, link: Any) -> None:
            world, send, receive = self.world, link.send, link.receive
            liar = world.liar if world.liar is not None and world.liar.name == self.name else None

            async def ask(frame: Frame) -> None:
                world._ask(self.name, type(frame).__name__)
                world.on_frame(world, self.name, neighbour, frame)
                await asyncio.sleep(world.lag_s.get(self.name, 0.0))
                for told in [frame] if liar is None else liar.tells(neighbour, frame):
                    await send(told)

            async def hear() -> Frame:
                frame = await receive()
                for told in [] if liar is None else liar.answers(neighbour, frame):
                    await send(told)
                return frame  # type: ignore[no-any-return]

            link.send, link.receive = ask, hear
            try:
                await talk(neighbour, link)
            except (LinkDown, FrameError, OSError):
                raise
            except Exception as error:
                world.broken.append(error)
                raise

        await super().serve(faulty)
