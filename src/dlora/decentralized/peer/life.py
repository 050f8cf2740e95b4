"""One peer's life in rounds, step by step: join, train, mix, finish. No sockets, no clock."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlora.decentralized.mixing import Rule, mix_edge
from dlora.decentralized.peer.exchange import Exchange
from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.messages import Messages
from dlora.decentralized.peer.messages_on_disk import round_message, round_of
from dlora.decentralized.peer.neighbour import Neighbour
from dlora.decentralized.peer.patience import BEATS
from dlora.decentralized.peer.spread import faded, too_far, widened
from dlora.decentralized.topology import Topology
from dlora.errors import NeighbourError, RunError
from dlora.events.neighbours import CaughtUp, Doubtful, LeftOut
from dlora.lora.factors import Factors

PARTING_S = 2.0  # seconds in which a neighbour of another run can read why this peer leaves
# the others may have done this many times the rounds that this peer would have done alone
FASTER = 10


@dataclass
class Progress:
    """What a commit holds besides factors and optimiser."""

    rounds_done: int = 0
    position: int = 0  # number of ledger entries that are in the factors
    # the round to which the peer last caught up; differences of earlier rounds are not added any
    # more
    since_round: int = 0
    # clock time in seconds of the last round in which it mixed an edge; 0: not known
    mixed_at: float = 0.0
    round_s: float = 0.0  # seconds of its fastest round; 0: not known
    # tensor name -> distance of the neighbours (`spread`)
    spread: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class PeerGossip:
    """Dec-LoRA (arXiv 2501.15361) for one peer: K local steps and a mix over the edges that both
    ends committed.

    Whoever trains calls these steps, one after the other::

        await gossip.join()
        while gossip.has_rounds_left:
            await gossip.begin_round()
            ...  # local steps
            await gossip.mix(names)  # of the tensors that took part in them
            await gossip.confirm(older)  # the oldest commit that the caller keeps
        average, num_peers = await gossip.finish()

    ``factors`` are (1, ...) each and changed in place. The caller hands in four functions.
    ``standing()`` returns the factors whose average is taken, without what a
    schedule has dropped. ``commit`` is told after each change of the factors, and an error in it
    refuses the change; a caller may write factors and progress to disk there, all or nothing.
    ``skip`` is told how many rounds were skipped. ``clock`` returns seconds, and goes on while the
    program does not run.

    Most of its attributes are what the caller hands in, and its methods are one life in order.
    """

    name: str
    factors: Factors
    topology: Topology
    rule: Rule
    ledger: Ledger
    exchange: Exchange
    messages: Messages
    rounds: int
    catch_up_after: int  # rounds behind a neighbour before its state is taken
    standing: Callable[[], Factors]
    commit: Callable[[Progress], object]
    skip: Callable[[int], object]
    clock: Callable[[], float]
    progress: Progress
    began_at: float = 0.0  # clock time in seconds at which the round began

    @property
    def has_rounds_left(self) -> bool:
        """Whether another round can begin."""
        return self.progress.rounds_done < self.rounds

    @property
    def index(self) -> int:
        """This peer's row in the mixing matrix."""
        return self.topology.names.index(self.name)

    async def join(self) -> None:
        """Greet the neighbours. Raises NeighbourError if one belongs to another run."""
        first, self.exchange.edges.since = self.progress.rounds_done == 0, self.progress.since_round
        if not self._has_average_of_all():
            # peers that were missing in that average may be here now
            self.ledger.forget_reduction()
        self.exchange.enter(self.progress.rounds_done)
        await self.exchange.greeted(
            self.exchange.patience.round_limit_s
            if first
            else self.exchange.patience.silence_s / BEATS
        )
        refused = [
            neighbour.refused
            for neighbour in self.exchange.neighbours.values()
            if neighbour.refused
        ]
        if first and refused:
            await asyncio.sleep(PARTING_S)
            raise NeighbourError(refused[0])
        self.progress.mixed_at = self.progress.mixed_at or self.clock()

    async def begin_round(self) -> None:
        """Begin the next round and tell the neighbours.

        A peer that is far behind takes its neighbours' state first, and goes on from their round.
        """
        await self._catch_up()
        self.began_at = self.clock()
        self.exchange.enter(self.progress.rounds_done)

    async def finish(self) -> tuple[Factors, int]:
        """Wait for the last decisions, then form the average of all peers.

        Returns the average, (1, ...) each, and how many peers are in it.
        """
        self.exchange.enter(self.rounds)
        self.exchange.wait_anew()
        await self.exchange.settled(self.rounds)
        self._mix()
        self.commit(self.progress)
        consensus, num_peers = await self._reduce()
        self.exchange.enter(self.rounds + 1)
        await self.exchange.settled(self.rounds + 1)
        self.exchange.compare("average", self.rounds + 1)
        self.commit(self.progress)
        await self.exchange.all_said()
        return consensus, num_peers

    def _has_average_of_all(self) -> bool:
        own = self.ledger.own("average")
        return (
            own is not None
            and self.messages.decode("average", own.path)["num_peers"].item()
            == self.topology.num_peers
        )

    async def mix(self, names: Collection[str]) -> int:
        """End the round that `begin_round` began: send, wait for its neighbours, mix, commit.

        ``names``: the tensors that took part in the local steps; these are sent. Returns the number
        of edges that were mixed. Raises RunError if this peer cannot go on.
        """
        number = self.progress.rounds_done
        sent = {
            name: tensor
            for name, tensor in self.factors.items()
            if self.rule.sends(name, number) and name in names
        }
        message = round_message(number)
        try:
            self.ledger.keep(message, self.messages.encode(message, sent))
        except ValueError as error:
            raise RunError(
                f"the factors of {self.name} cannot be sent in round {number}: {error}; lower"
                " train.learning_rate and start anew in another output_dir"
            ) from error
        await self.exchange.mix_round(
            self.topology.names[other] for other in self.topology.neighbours(self.index, number)
        )
        self.progress.spread = faded(self.progress.spread)
        mixed, now = self._mix(), self.clock()
        self.progress.rounds_done = number + 1
        if mixed:
            self.progress.mixed_at = now
        if (took_s := now - self.began_at) > 0:  # a clock may be set back
            self.progress.round_s = min(self.progress.round_s or took_s, took_s)
        self.commit(self.progress)
        return mixed

    async def confirm(self, progress: Progress) -> None:
        """Remove the messages that nobody needs if no older commit than ``progress`` is gone on
        from.
        """
        self.ledger.clean(progress.rounds_done, progress.position)

    def _mix(self) -> int:
        """x_i += w_ij (sent_j - sent_i) for each edge committed since the last mix.

        These are edges of this round, and edges of earlier rounds whose decision has come now.
        Returns their number.
        """
        position, mixed = self.ledger.position, 0
        names = self.topology.names
        # The order does not depend on which message came first: a sum of floats depends on its
        # order, and AdamW enlarges a difference in the last bit.
        sent: dict[str, Mapping[str, Tensor]] = {}  # by message name
        dues = self.ledger.due(self.progress.position, self.progress.since_round)
        for due in sorted(dues, key=lambda due: (due.round, names.index(due.neighbour))):
            weight = self.topology.mixing(due.round)[self.index, names.index(due.neighbour)]
            name = round_message(due.round)
            own = sent.get(name) or self.messages.decode(name, due.own)
            sent, theirs = {name: own}, self.messages.decode(name, due.theirs)
            apart = mix_edge(self.factors, float(weight), own, theirs)
            self.progress.spread = widened(self.progress.spread, apart)
            mixed += 1
        self.progress.position = position
        return mixed

    async def _catch_up(self) -> None:
        """If this peer is far behind, take the median of its neighbours' last messages and go on
        from their round.

        More than half of all neighbours must be ahead, also counting those that are away, and by no
        more rounds than this peer's clock allows. A single neighbour is more than half of one: then
        only the clock limits how many rounds it can make this peer skip. The mean over peers is not
        kept here. The peer gives up what it learnt since its last mix, except in units that none of
        the messages holds: these stay as they are.
        """
        neighbours = self.exchange.neighbours.values()
        needed, was, most = len(neighbours) // 2 + 1, self.progress.rounds_done, self._most_missed()
        ahead: dict[str, str] = {}
        for neighbour in neighbours:
            jump = self._ahead(neighbour)
            if jump > self.catch_up_after and jump <= most:
                ahead[neighbour.name] = neighbour.offers["round"].name
            elif jump > self.catch_up_after:
                reason = (
                    f"it says it is {jump} rounds ahead; by this peer's clock at most {most:.0f}"
                    " can have been missed"
                )
                self.exchange.disbelieve(neighbour.name, reason)
        if len(ahead) < needed:
            # a few neighbours that are ahead, or say so, do not stand for the whole run
            for name in ahead:
                reason = (
                    f"{len(ahead)} of {len(neighbours)} neighbours say they are ahead, and {needed}"
                    " are needed"
                )
                self.exchange.disbelieve(name, reason)
            return
        paths = await asyncio.gather(
            *(self.exchange.fetch(name, message) for name, message in ahead.items())
        )
        states = [
            (message, path)
            for message, path in zip(ahead.values(), paths, strict=True)
            if path is not None
        ]
        if len(states) < needed:
            return
        taken = [self.messages.decode(message, path) for message, path in states]
        with torch.no_grad():
            for name, tensor in self.factors.items():
                if held := [state[name] for state in taken if name in state]:
                    tensor.copy_(median(held))
        rounds = sorted(round_of(message) or 0 for message, _ in states)
        now = rounds[(len(rounds) - 1) // 2]
        self.skip(now - was)
        self.progress.rounds_done, self.progress.position, self.progress.since_round = (
            now,
            self.ledger.position,
            now,
        )
        self.commit(self.progress)
        self.exchange.edges.since = now
        self.exchange.report(
            CaughtUp(event="caught-up", round=now, was=was, neighbours=sorted(ahead))
        )

    def _ahead(self, neighbour: Neighbour) -> int:
        """How many rounds a neighbour's last message is ahead of this peer; 0 without a link or a
        message.
        """
        offer = neighbour.offers.get("round") if neighbour.link is not None else None
        return 0 if offer is None else (round_of(offer.name) or 0) - self.progress.rounds_done

    def _most_missed(self) -> float:
        """How many rounds the others can have done since this peer last mixed with one of them.

        They wait for a peer that is there, so they cannot be far ahead of one that mixes. While it
        is away they go at their own pace, and the bound is ``FASTER`` times the pace of its fastest
        round. A peer that has done no round here knows no pace. It then believes more than half of
        several neighbours, but no single neighbour.
        """
        progress = self.progress
        if not progress.round_s:
            return math.inf if len(self.exchange.neighbours) > 1 else 0
        return FASTER * max(0.0, self.clock() - progress.mixed_at) // progress.round_s

    async def _reduce(self) -> tuple[Factors, int]:
        """The exact average of all peers over a tree of neighbours: sums go up to the root, the
        average comes down.

        It takes 2 (n - 1) messages, in float32, on the CPU. A peer that cannot be reached is left
        out; each branch below it has its own average. A sum is left out too if it overflows or
        counts more peers than are below its sender. A sum or an average that is far from all that
        this peer has seen is used, but its sender is reported. Every neighbour is told the hash of
        the average.
        """
        parent, children = self.topology.tree(self.index)
        names = self.topology.names
        paths = await asyncio.gather(
            *(self.exchange.fetch(names[child], "sum") for child in children)
        )
        total = {name: tensor.cpu() for name, tensor in self.standing().items()} | {
            "num_peers": torch.ones(1, 1)
        }
        for (child, num_below), path in zip(children.items(), paths, strict=True):
            if path is None:
                continue
            part = self.messages.decode("sum", path)
            joined = {name: tensor + part[name] for name, tensor in total.items()}
            if part["num_peers"].item() > num_below or not all(
                tensor.isfinite().all() for tensor in joined.values()
            ):
                reason = f"its sum is not that of {num_below} peers"
                self.exchange.report(
                    LeftOut(event="left-out", neighbour=names[child], reason=reason)
                )
                continue
            self._judge(
                names[child],
                "sum",
                {name: tensor / part["num_peers"].item() for name, tensor in part.items()},
            )
            total = joined
        num_peers = round(total["num_peers"].item())
        average = {name: tensor / num_peers for name, tensor in total.items()} | {
            "num_peers": total["num_peers"]
        }
        if parent is not None:
            self.ledger.keep("sum", self.messages.encode("sum", total))
            self.exchange.offer([names[parent]], "sum")
            came = await self.exchange.fetch(names[parent], "average")
            if came is not None:
                average = dict(self.messages.decode("average", came))
                self._judge(names[parent], "average", average)
        # one that was made before stays: the others have it
        kept = self.ledger.keep("average", self.messages.encode("average", average))
        self.exchange.offer(self.exchange.neighbours, "average")
        average = dict(self.messages.decode("average", kept.path))
        return average, round(average.pop("num_peers").item())

    def _judge(self, sender: str, message: str, mean: Mapping[str, Tensor]) -> None:
        """Report the sender of a mean that is far from all that this peer has seen."""
        own = {name: tensor.cpu() for name, tensor in self.standing().items()}
        far = too_far(self.progress.spread, self.topology.num_peers, own, mean)
        if far:
            reason = (
                f"it is far from all that this peer has seen, in {len(far)} of {len(own)} tensors,"
                f" such as {far[0]}"
            )
            self.exchange.report(
                Doubtful(event="doubtful", neighbour=sender, message=message, reason=reason)
            )


def median(states: Sequence[Tensor]) -> Tensor:
    """The median of each number; for an even count, the mean of the two in the middle."""
    ordered = torch.stack(list(states)).sort(dim=0).values
    return (ordered[(len(states) - 1) // 2] + ordered[len(states) // 2]) / 2
