"""One participant's life in rounds: train, exchange, mix, commit. No sockets, no clock in it.

Written twice: `Gossip` for all the participants of a simulation at once ((P, ...) tensors), `PeerGossip` for one peer among
others that may be late, gone or broken. While nothing fails they are the same to rounding (law 5).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dlora.decentralized.exchange import BEATS, Exchange
from dlora.decentralized.ledger import Ledger, round_message, round_of
from dlora.decentralized.mixing import Rule, mix, mix_edge
from dlora.decentralized.topology import Topology
from dlora.errors import NeighbourError, RunError
from dlora.lora.factors import Factors

Edge = tuple[int, int]
PARTING_S = 2.0  # for a neighbour in another run to read why this peer goes


class Transport(Protocol):
    """What moves a message along the edges of a round."""

    def exchange(
        self, round: int, sent: Mapping[str, Tensor], edges: Sequence[Edge], names: Sequence[Collection[str]] | None = None
    ) -> Sequence[Edge]:
        """Send each participant's message ((P, ...) tensors) over its ``edges``; return those both ends committed.

        ``names``: of each participant, which of the tensors its message holds; None: all.
        """


@dataclass
class Gossip:
    """Dec-LoRA, Algorithm 1, for every participant: K local steps on (A, B), then a mix of A and B apart.

    The mix is x_i <- sum_j w_ij x_j. A participant that fails between two commits loses the local steps since the last
    one, nothing else. With a schedule, ``took_part`` says of each participant what the round's local steps may have changed;
    that alone is sent, and an edge mixes what both its ends sent (`mixing`: what this does to the mean).
    """

    factors: Factors
    topology: Topology
    rule: Rule
    transport: Transport
    wire: torch.dtype = torch.float32
    took_part: Callable[[], Sequence[Collection[str]]] | None = None

    def round(self, number: int, train: Callable[[frozenset[str]], Tensor]) -> Tensor:
        """One round. ``train`` takes the names that train and returns losses (P,), which are returned."""
        losses = train(trained(self.factors, self.rule, number))
        sent = {
            name: tensor.to(self.wire).to(tensor.dtype)  # both sides of a difference are what travelled
            for name, tensor in self.factors.items()
            if self.rule.sends(name, number)
        }
        names = self.took_part() if self.took_part is not None else None
        committed = self.transport.exchange(number, sent, self.topology.edges(number), names)
        mix(self.factors, sent, self.topology.mixing(number), committed, names)
        return losses


def trained(factors: Factors, rule: Rule, round: int) -> frozenset[str]:
    """The tensors that take local steps in a round."""
    return frozenset(name for name in factors if rule.trains(name, round))


@dataclass
class Progress:
    """What a commit holds beside factors and optimiser."""

    rounds_done: int = 0
    position: int = 0  # of the ledger: the entries up to here are in the factors
    since_round: int = 0  # the round to which the peer last caught up; differences of earlier ones are moot


@dataclass
class PeerGossip:
    """Dec-LoRA for one peer: the same K local steps and mix, over the edges that both ends committed.

    ``factors`` are (1, ...) each and changed in place. Handed in by the program: ``train(round, names)``, which returns the
    names of what took part and so is to be sent; ``standing``, the function that the average is taken of (the factors without
    what a schedule has dropped); ``encode`` and ``decode`` (tensors <-> a message of that name); ``commit`` (factors,
    optimiser and progress to disk, all or nothing); and ``skip``, which hears how many rounds were passed over.
    """

    name: str
    factors: Factors
    topology: Topology
    rule: Rule
    ledger: Ledger
    exchange: Exchange
    rounds: int
    catch_up_after: int  # rounds behind a neighbour before its state is taken
    train: Callable[[int, frozenset[str]], Awaitable[Collection[str]]]
    standing: Callable[[], Factors]
    encode: Callable[[str, Mapping[str, Tensor]], bytes]
    decode: Callable[[str, Path], Mapping[str, Tensor]]
    commit: Callable[[Progress], object]
    skip: Callable[[int], object]
    progress: Progress

    @property
    def index(self) -> int:
        """This peer's row of the mixing matrix."""
        return self.topology.names.index(self.name)

    async def run(self) -> tuple[Factors, int]:
        """All rounds that are left, then the average of all peers ((1, ...) each) and how many of them are in it."""
        first = self.progress.rounds_done == 0
        if self.progress.rounds_done == self.rounds and not self._has_average_of_all():
            self.ledger.forget_reduction()  # who was missing then may be here now
        self.exchange.enter(self.progress.rounds_done)
        await self.exchange.greeted(self.exchange.patience.round_limit_s if first else self.exchange.patience.silence_s / BEATS)
        refused = [neighbour.refused for neighbour in self.exchange.neighbours.values() if neighbour.refused]
        if first and refused:
            await asyncio.sleep(PARTING_S)
            raise NeighbourError(refused[0])
        while self.progress.rounds_done < self.rounds:
            await self._catch_up()
            await self._round()
        self.exchange.enter(self.rounds)
        self.exchange.wait_anew()
        await self.exchange.settled(self.rounds)
        self._mix()
        self.commit(self.progress)
        consensus, num_peers = await self._reduce()
        self.exchange.enter(self.rounds + 1)
        await self.exchange.settled(self.rounds + 1)
        self.commit(self.progress)
        return consensus, num_peers

    def _has_average_of_all(self) -> bool:
        own = self.ledger.own("average")
        return own is not None and self.decode("average", own.path)["num_peers"].item() == self.topology.num_peers

    async def _round(self) -> None:
        """Algorithm 1 at one peer."""
        number = self.progress.rounds_done
        self.exchange.enter(number)
        names = await self.train(number, trained(self.factors, self.rule, number))
        sent = {name: tensor for name, tensor in self.factors.items() if self.rule.sends(name, number) and name in names}
        message = round_message(number)
        content = self.encode(message, sent)
        kept = self.ledger.keep(message, content)
        try:
            self.decode(message, kept.path)
        except ValueError as error:
            if kept.num_bytes != len(content):
                raise RunError(f"{kept.path} is not what was kept there ({error}); restore it from a copy") from error
            raise RunError(
                f"the factors of {self.name} cannot be sent in round {number}: {error}; lower train.learning_rate and start"
                " anew in another output_dir"
            ) from error
        older = self.progress.position  # of the commit before this round's, which stays beside it
        await self.exchange.mix_round(self.topology.names[other] for other in self.topology.neighbours(self.index, number))
        self._mix()
        self.progress.rounds_done = number + 1
        self.commit(self.progress)
        self.ledger.clean(number, older)

    def _mix(self) -> None:
        """x_i += w_ij (sent_j - sent_i) for each edge committed since the last mix: this round's, and doubts now settled."""
        position = self.ledger.position
        for due in self.ledger.due(self.progress.position, self.progress.since_round):
            weight = self.topology.mixing(due.round)[self.index, self.topology.names.index(due.neighbour)]
            name = round_message(due.round)
            mix_edge(self.factors, float(weight), self.decode(name, due.own), self.decode(name, due.theirs))
        self.progress.position = position

    async def _catch_up(self) -> None:
        """Far behind the neighbours: take the mean of what they last sent, and go on from their round.

        The mean over peers is not kept here; what this peer learnt since it left is given up, save in units that none of
        those messages holds: killed there, they stay as they are here.
        """
        here = [neighbour for neighbour in self.exchange.neighbours.values() if neighbour.link is not None]
        ahead = {
            neighbour.name: offer.name
            for neighbour in here
            if (offer := neighbour.offers.get("round")) is not None
            and (round_of(offer.name) or 0) - self.progress.rounds_done > self.catch_up_after
        }
        if 2 * len(ahead) <= len(here):
            return  # one neighbour that is ahead, or says so, is not the run
        paths = await asyncio.gather(*(self.exchange.fetch(name, message) for name, message in ahead.items()))
        states = [(message, path) for message, path in zip(ahead.values(), paths, strict=True) if path is not None]
        if not states:
            return
        taken = [self.decode(message, path) for message, path in states]
        with torch.no_grad():
            for name, tensor in self.factors.items():
                if held := [state[name] for state in taken if name in state]:
                    tensor.copy_(torch.stack(held).mean(dim=0))
        rounds = sorted(round_of(message) or 0 for message, _ in states)
        was, now = self.progress.rounds_done, rounds[(len(rounds) - 1) // 2]
        self.skip(now - was)
        self.progress = Progress(now, self.ledger.position, now)
        self.commit(self.progress)
        self.exchange.report("caught-up", round=now, was=was, neighbours=sorted(ahead))

    async def _reduce(self) -> tuple[Factors, int]:
        """The exact average of all peers over a tree of neighbours: sums go up to the first peer, the average comes down.

        2 (n - 1) messages in all, in float32, on the CPU. What cannot be reached is left out: below a peer that is gone each
        branch has the average of its own. So is a sum that counts more peers than there are below, or that overflows.
        """
        parent, children = self.topology.tree(self.index)
        names = self.topology.names
        paths = await asyncio.gather(*(self.exchange.fetch(names[child], "sum") for child in children))
        total = {name: tensor.cpu() for name, tensor in self.standing().items()} | {"num_peers": torch.ones(1, 1)}
        for (child, num_below), path in zip(children.items(), paths, strict=True):
            if path is None:
                continue
            part = self.decode("sum", path)
            joined = {name: tensor + part[name] for name, tensor in total.items()}
            if part["num_peers"].item() > num_below or not all(tensor.isfinite().all() for tensor in joined.values()):
                self.exchange.report("left-out", neighbour=names[child], reason=f"its sum is not that of {num_below} peers")
                continue
            total = joined
        num_peers = round(total["num_peers"].item())
        average = {name: tensor / num_peers for name, tensor in total.items()} | {"num_peers": total["num_peers"]}
        if parent is not None:
            self.ledger.keep("sum", self.encode("sum", total))
            self.exchange.offer([names[parent]], "sum")
            came = await self.exchange.fetch(names[parent], "average")
            if came is not None:
                average = dict(self.decode("average", came))
                num_peers = round(average["num_peers"].item())
        self.ledger.keep("average", self.encode("average", average))
        self.exchange.offer([names[child] for child in children], "average")
        average.pop("num_peers")
        return average, num_peers
