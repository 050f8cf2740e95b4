"""What a peer does for a training script: rounds on copies of the script's tensors."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from torch import Tensor

from dlora.decentralized.peer.belief import Belief, copied, distance
from dlora.decentralized.peer.check import Check
from dlora.decentralized.peer.life import PeerGossip, Progress
from dlora.decentralized.peer.messages import WIRE_DTYPES, TensorMessages
from dlora.errors import RunError
from dlora.events.neighbours import RoundMixed
from dlora.lora.factors import Factors
from dlora.run.findings import Findings
from dlora.run.membership import Membership, make_gossip
from dlora.run.script_place import Place

# What a number may move in one round, for the bound on messages before this peer has trained: a
# script's learning rate is not known here. 100 times as much is refused (`Belief`).
MOST_A_ROUND = 0.1
TOLD_S = 20.0  # a wait for neighbours is told after so long


class Mixed(NamedTuple):
    """What one call of `dlora.Peer.mix` did.

    ``round``: its number, from 0. ``neighbours``: those with which it was mixed. ``wait_s``: how
    many seconds the script waited. ``num_bytes``: bytes sent and received since the last call.
    ``distance``: the norm of what mixing changed. ``is_last``: no round is left.
    """

    round: int
    neighbours: tuple[str, ...]
    wait_s: float
    num_bytes: int
    distance: float
    is_last: bool


class ScriptPeer:
    """One peer that mixes copies of a script's tensors; `close` ends its links.

    ``start``: the tensors, (1, ...) each, on the CPU. ``state``: what `state` returned when the
    script made the checkpoint from which it goes on; None: it begins.
    """

    def __init__(self, place: Place, start: Factors, state: Mapping[str, Any] | None) -> None:
        self.place = place
        self.progress = Progress(**state["progress"]) if state else Progress()
        self._check_ledger(state)
        self.messages = TensorMessages(
            shapes={name: tuple(tensor.shape[1:]) for name, tensor in start.items()},
            rule=place.rule,
            wire=WIRE_DTYPES[place.section.wire],
            rounds=place.section.rounds,
            num_peers=place.topology.num_peers,
        )
        self.belief = Belief.of(start, MOST_A_ROUND)
        if state:
            self.belief.load(state["belief"])
        self.findings = Findings(place.name, place.topology.num_peers, place.log.emit)
        self.factors = copied(start)  # what the gossip mixes
        self._walked: Factors = {}  # what the round that runs sends, until it is committed
        self._running: Future[tuple[int, list[str], float]] | None = None
        self._num_bytes = 0
        self.names = frozenset(start)  # the tensors that train now
        self.membership = Membership(place.loop, self._gossip, place.network)

    def join(self) -> None:
        """Greet the neighbours, and begin the first round that is left.

        ``factors`` change here if this peer takes the state of neighbours that are far ahead.
        Raises NeighbourError if a neighbour is in another run.
        """
        gossip = self.membership.gossip
        self.membership.wait(gossip.join())
        if gossip.has_rounds_left:
            self.names = self.membership.wait(gossip.begin_round())
        self._note_progress()

    @property
    def has_rounds_left(self) -> bool:
        """Whether another round can begin."""
        return self.progress.rounds_done + (self._running is not None) < self.place.section.rounds

    def begin(self, now: Factors) -> None:
        """Send ``now`` as this round's message and begin to mix it.

        Raises RunError if it holds a number that is not finite.
        """
        # ``factors`` are what the script was given, so the difference is its local steps
        if not math.isfinite(self.belief.walked(self.factors, now)):
            lost = [name for name, tensor in now.items() if not tensor.isfinite().all()]
            raise RunError(
                f"{self.place.name} sends nothing in round {self.progress.rounds_done}:"
                f" {lost[0] if lost else 'its change'} is not finite; lower the learning rate and"
                " go on from an earlier checkpoint"
            )
        self._running = self.membership.start(self._round(now))

    def end(self) -> Mixed | None:
        """Wait for the round that `begin` began; None if there is none. ``factors`` are mixed."""
        if self._running is None:
            return None
        began_at = time.monotonic()
        try:
            number, neighbours, apart = self.membership.result(self._running, self._tell_of_wait())
        finally:
            self._running = None
        wait_s = time.monotonic() - began_at
        traffic = self.place.network.traffic
        before, self._num_bytes = (
            self._num_bytes,
            sum(traffic.sent_bytes.values()) + sum(traffic.received_bytes.values()),
        )
        self._note_progress()
        mixed = Mixed(
            number,
            tuple(neighbours),
            wait_s,
            self._num_bytes - before,
            apart,
            not self.has_rounds_left,
        )
        self.place.log.emit(
            RoundMixed(
                event="mixed",
                round=number,
                neighbours=neighbours,
                wait_s=wait_s,
                num_bytes=mixed.num_bytes,
                distance=apart,
            )
        )
        return mixed

    def _tell_of_wait(self) -> Callable[[], None]:
        """A function that says once, after a while, for whom a wait is."""
        told_at: float | None = time.monotonic() + TOLD_S

        def look() -> None:
            nonlocal told_at
            if told_at is not None and time.monotonic() >= told_at:
                told_at, place = None, self.place
                number = self.membership.gossip.progress.rounds_done
                index = place.topology.names.index(place.name)
                names = [
                    place.topology.names[one] for one in place.topology.neighbours(index, number)
                ]
                late = [one for one in names if place.ledger.state(number, one) is None]
                warnings.warn(
                    f"{place.name} waits in round {number} for {', '.join(late) or 'nobody'}, at"
                    f" most {place.section.round_limit_s:g} s, or"
                    f" {place.section.silence_s:g} s without a sign of life",
                    stacklevel=2,
                )

        return look

    def average(self, now: Factors) -> tuple[dict[str, Tensor], list[str]]:
        """The average of all peers, of which this one has ``now``, and what a user should know.

        ``factors`` are ``now`` with the last decisions. If rounds are left, this peer leaves them
        out.
        """
        told = []
        if self.progress.rounds_done < self.place.section.rounds:
            told.append(
                f"{self.place.name} has mixed {self.progress.rounds_done} of"
                f" {self.place.section.rounds} rounds; it leaves out the others: set rounds in"
                " peers.yaml to how often the script mixes"
            )
        consensus, num_peers = self.membership.wait(self._finish(now))
        self._note_progress()
        told += self.findings.warnings(num_peers)
        if blamed := self.findings.blamed(num_peers):
            told.append(blamed)
        return {name: tensor[0] for name, tensor in consensus.items()}, told

    def state(self) -> dict[str, Any]:
        """Where the script's tensors stand, in types that JSON can hold."""
        return {
            "progress": dict(vars(self.progress)),
            "chain": self.place.ledger.chain(self.progress.position),
            "belief": self.belief.state(),
        }

    def confirm(self, state: Mapping[str, Any]) -> None:
        """Remove the messages that only checkpoints before ``state`` need."""
        self.membership.wait(self.membership.gossip.confirm(Progress(**state["progress"])))

    def close(self) -> None:
        """End all links."""
        self.membership.close()

    def _note_progress(self) -> None:
        """What ``factors`` hold, the script is about to have."""
        self.progress = Progress(**vars(self.membership.gossip.progress))

    def _check_ledger(self, state: Mapping[str, Any] | None) -> None:
        """Raise RunError if the ledger lacks what must be added to the script's tensors."""
        progress, ledger = self.progress, self.place.ledger
        try:
            ledger.check(progress.position, state["chain"] if state else None, progress.since_round)
        except RunError:
            if state is not None:
                raise
            raise RunError(
                f"{ledger.folder} holds a run whose early messages are gone, because later"
                " checkpoints were saved: load the last one into the script and give its state to"
                " load_state_dict, or start anew in another state_dir"
            ) from None

    async def _round(self, now: Factors) -> tuple[int, list[str], float]:
        gossip, place = self.membership.gossip, self.place
        number, self._walked = gossip.progress.rounds_done, now
        self._take(now)
        await gossip.mix(frozenset(now))
        self._walked, apart = {}, distance(now, self.factors)
        neighbours = [
            place.topology.names[other]
            for other in place.topology.neighbours(gossip.index, number)
            if place.ledger.state(number, place.topology.names[other]) == "committed"
        ]
        if gossip.has_rounds_left:
            self.names = await gossip.begin_round()
        return number, neighbours, apart

    async def _finish(self, now: Factors) -> tuple[Factors, int]:
        self._take(now)
        return await self.membership.gossip.finish()

    def _take(self, now: Factors) -> None:
        for name, tensor in now.items():
            self.factors[name].copy_(tensor)

    def _gossip(self) -> PeerGossip:
        place = self.place

        def own() -> Factors:
            return self.factors

        return make_gossip(
            place.section,
            place.rule,
            name=place.name,
            manifest=place.manifest,
            topology=place.topology,
            rounds=place.section.rounds,
            messages=self.messages,
            ledger=place.ledger,
            signatures=place.signatures,
            factors=self.factors,
            standing=own,
            check=Check(self.messages, self.belief, own, own),
            report=self.findings,
            commit=self._commit,
            skip=lambda rounds: None,
            progress=Progress(**vars(self.progress)),
        )

    def _commit(self, progress: Progress) -> None:
        if not self.belief.holds(progress.rounds_done, self._walked, self.factors):
            raise RunError(
                f"{self.place.name} does not take round {progress.rounds_done}: what its neighbours"
                " sent took its tensors further than any training does; start anew in another"
                f" state_dir, without the member that {self.place.log.path} names"
            )
