"""One peer among its neighbours, for a thread that trains: rounds on copies of its tensors."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from dlora.decentralized.gossip import trained
from dlora.decentralized.peer.belief import Belief, distance
from dlora.decentralized.peer.check import Check
from dlora.decentralized.peer.exchange import Exchange
from dlora.decentralized.peer.life import PeerGossip, Progress
from dlora.decentralized.peer.patience import Patience
from dlora.errors import RunError
from dlora.lora.factors import Factors
from dlora.net.steps import Look, Steps
from dlora.net.transport import Talk
from dlora.run.findings import Findings
from dlora.run.manifest import manifest_hash, manifest_text
from dlora.run.place import Place

# of dlora 0.1.0, which had no belief in its checkpoints
NO_BELIEF: Mapping[str, Any] = {"way": 0.0, "rounds": 0, "seen": {}}


class Exchanged(NamedTuple):
    """What one round's exchange did.

    ``round``: its number. ``neighbours``: those with which it was mixed. ``distance``: the norm of
    what mixing changed.
    """

    round: int
    neighbours: list[str]
    distance: float


class Membership:
    """One peer among its neighbours, for a thread that trains; `close` ends its links.

    A round of Dec-LoRA, in the thread that trains::

        ...                          # local steps on the tensors in `names`
        membership.walked(now)       # ``now``: copies of the tensors
        membership.begin(now, sent)  # the exchange begins, in an event loop of its own
        ...                          # with overlap: the next round's local steps
        membership.end()             # the exchange is done
        tensors += factors - now     # what mixing has changed

    ``now`` has (1, ...) each, on the CPU. The gossip works on copies, ``factors``. What mixing adds
    to them depends on the messages only, so the trainer may also add it later: the mean over peers
    is the same.

    ``start``: the trainer's tensors. ``state``: what `state` returned when the trainer made the
    checkpoint from which it goes on; None: it begins. ``standing(factors)``: the factors whose
    average is taken, without what a schedule has dropped. ``around`` replaces the conversation with
    a neighbour by one that calls it. ``again``: how a user starts peers again. Raises RunError if
    the ledger lacks what must be added to the trainer's tensors.

    Its attributes are the parts of the gossip, and what the exchange that runs began with.
    """

    def __init__(
        self,
        place: Place,
        start: Factors,
        belief: Belief,
        state: Mapping[str, Any] | None,
        standing: Callable[[Factors], Factors] = lambda factors: factors,
        around: Callable[[Talk], Talk] = lambda talk: talk,
        again: str = "with --resume",
    ) -> None:
        self.place, self.belief = place, belief
        self.progress = Progress(**state["progress"]) if state else Progress()
        place.ledger.check(
            self.progress.position,
            state.get("chain") if state else None,
            self.progress.since_round,
        )
        if state:
            belief.load(state.get("belief", NO_BELIEF))
        # the tensors that the exchange under way sent when the checkpoint was made, if one was
        self.under_way: Collection[str] | None = state.get("under_way") if state else None
        self.findings = Findings(place.name, place.topology.num_peers, place.log.emit, again)
        self.factors = {name: tensor.to("cpu", copy=True) for name, tensor in start.items()}
        self.skipped = 0  # rounds skipped to catch up; the trainer sets it back when it has heard
        self._standing = standing
        self._now: Factors = {}  # what the exchange that runs began with, until it is committed
        self._moved = 0.0  # how far it moved the factors
        self._running: Future[Exchanged] | None = None
        # they fail with the network or with this peer's own disk
        self.steps = Steps(place.loop)
        self._gossip = self.steps.wait(self._open(around))

    @property
    def rounds_begun(self) -> int:
        """The number of rounds whose exchange has begun; the next local steps belong to the
        next.
        """
        return self.progress.rounds_done + (self._running is not None)

    @property
    def has_rounds_left(self) -> bool:
        """Whether another round can begin."""
        return self.rounds_begun < self.place.messages.rounds

    @property
    def names(self) -> frozenset[str]:
        """The tensors that the next local steps train."""
        return trained(self.factors, self.place.messages.rule, self.rounds_begun)

    def join(self, look: Look = lambda: None) -> None:
        """Greet the neighbours, and begin the first round that is left.

        ``factors`` change here if this peer takes the state of neighbours that are far ahead. If
        ``under_way`` is not None, `begin` must follow. Raises NeighbourError if a neighbour is in
        another run. ``look``: see `end`.
        """
        self.steps.wait(self._gossip.join(), look)
        if self._gossip.has_rounds_left:
            self.steps.wait(self._gossip.begin_round(), look)
        if self.under_way is not None:
            self._gossip.began_at = math.inf  # no local steps come: the pace is not that of a round
        self._note_progress()

    def walked(self, now: Factors) -> None:
        """Add this round's local steps to this peer's own way (`Belief`); once, before `begin`.

        Raises RunError if a number is not finite.
        """
        # ``factors`` are what the trainer was given, so the difference is its local steps
        if not math.isfinite(self.belief.walked(self.factors, now)):
            lost = [name for name, tensor in now.items() if not tensor.isfinite().all()]
            raise RunError(
                f"{self.place.name} sends nothing in round {self.rounds_begun}:"
                f" {lost[0] if lost else 'its change'} is not finite; lower the learning rate and"
                " go on from an earlier checkpoint"
            )

    def begin(self, now: Factors, sent: Collection[str] | None = None) -> None:
        """Send ``now`` as this round's message and begin to mix it.

        ``sent``: the tensors that took part in the local steps; None: all.
        """
        self.under_way = list(now if sent is None else sent)
        self._running = self.steps.start(self._round(now, self.under_way))

    def end(self, look: Look = lambda: None) -> Exchanged | None:
        """Wait for the exchange that `begin` began; None if there is none. ``factors`` are mixed.

        ``look`` is called five times a second meanwhile. An error in it ends the wait, and the
        exchange goes on. Raises also the error of the network or of the disk.
        """
        if self._running is None:
            return None
        done = self.steps.result(self._running, look)
        self._running = self.under_way = None
        self._note_progress()
        return done

    def average(self, now: Factors, look: Look = lambda: None) -> tuple[Factors, int]:
        """The average of all peers, of which this one has ``now``, and how many peers are in it.

        ``factors`` are ``now`` with the last decisions. If rounds are left, this peer leaves them
        out.
        """
        average = self.steps.wait(self._finish(now), look)
        self._note_progress()
        return average

    def absent(self) -> list[str]:
        """The neighbours with which there is no link now."""
        return [one.name for one in self._gossip.exchange.neighbours.values() if one.link is None]

    def late(self) -> list[str]:
        """The neighbours for which this peer waits now."""
        return self._gossip.exchange.late()

    def state(self, under_way: Collection[str] | None = None) -> dict[str, Any]:
        """Where the trainer's tensors stand, in types that JSON can hold.

        ``under_way``: what an exchange sends that begins as soon as this is saved.
        """
        return self.steps.wait(self._state(self.under_way if under_way is None else under_way))

    def confirm(self, progress: Progress) -> None:
        """Remove the messages that only checkpoints before ``progress`` need."""
        self.steps.wait(self._gossip.confirm(progress))

    def close(self) -> None:
        """End the steps that run, and all links."""
        self.steps.close()

    def _note_progress(self) -> None:
        """What ``factors`` hold, the trainer is about to have."""
        self.progress = Progress(**vars(self._gossip.progress))

    # In the thread of the event loop

    async def _state(self, under_way: Collection[str] | None) -> dict[str, Any]:
        return {
            "progress": dict(vars(self.progress)),
            "chain": self.place.ledger.chain(self.progress.position),
            "belief": self.belief.state(),
            "under_way": None if under_way is None else sorted(under_way),
        }

    async def _round(self, now: Factors, sent: Collection[str]) -> Exchanged:
        gossip, place = self._gossip, self.place
        number = gossip.progress.rounds_done
        self._take(now)
        await gossip.mix(sent)
        self._now, moved = {}, self._moved
        names = place.topology.names
        neighbours = [
            names[other]
            for other in place.topology.neighbours(gossip.index, number)
            if place.ledger.state(number, names[other]) == "committed"
        ]
        if gossip.has_rounds_left:
            await gossip.begin_round()
        return Exchanged(number, neighbours, moved)

    async def _finish(self, now: Factors) -> tuple[Factors, int]:
        self._take(now)
        return await self._gossip.finish()

    def _take(self, now: Factors) -> None:
        self._now = now
        for name, tensor in now.items():
            self.factors[name].copy_(tensor)

    def _commit(self, progress: Progress) -> None:
        self._moved = distance(self._now, self.factors)
        if not self.belief.holds(progress.rounds_done, self._moved):
            raise RunError(
                f"{self.place.name} does not take round {progress.rounds_done}: what its neighbours"
                " sent took its tensors further than any training does; start anew in another"
                f" folder, without the member that {self.place.log.path} names"
            )

    def _skip(self, rounds: int) -> None:
        self.skipped += rounds

    async def _open(self, around: Callable[[Talk], Talk]) -> PeerGossip:
        place, section = self.place, self.place.section

        def own() -> Factors:
            return self.factors

        def standing() -> Factors:
            return self._standing(self.factors)

        exchange = Exchange(
            name=place.name,
            manifest=manifest_text(place.manifest),
            manifest_hash=manifest_hash(place.manifest),
            ledger=place.ledger,
            neighbours=place.topology.neighbour_names(place.name),
            patience=Patience(section.silence_s, section.round_limit_s),
            messages=place.messages,
            check=Check(place.messages, self.belief, own, standing),
            report=self.findings,
            signatures=place.signatures,
        )
        self.steps.serve(asyncio.create_task(place.network.serve(around(exchange.talk))))
        self.steps.watch(exchange.failed)
        return PeerGossip(
            name=place.name,
            factors=self.factors,
            topology=place.topology,
            rule=place.messages.rule,
            ledger=place.ledger,
            exchange=exchange,
            messages=place.messages,
            rounds=place.messages.rounds,
            catch_up_after=section.catch_up_after,
            standing=standing,
            commit=self._commit,
            skip=self._skip,
            clock=time.time,
            progress=Progress(**vars(self.progress)),
        )
