"""What a peer does for a training script: it says for whom it waits, and what a round did."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from dlora.decentralized.peer.belief import Belief
from dlora.decentralized.peer.life import Progress
from dlora.errors import RunError
from dlora.events.neighbours import RoundMixed
from dlora.lora.factors import Factors
from dlora.run.membership import Membership
from dlora.run.place import Place

# What a number may move in one round, for the bound on messages before this peer has trained: a
# script's learning rate is not known here. 100 times as much is refused (`Belief`).
MOST_A_ROUND = 0.1
TOLD_S = 20.0  # a wait for neighbours is told after so long


class Mixed(NamedTuple):
    """What one call of `dlora.Peer.mix` did.

    ``round``: its number, from 0. ``neighbours``: those with which it was mixed. ``wait_s``: how
    many seconds the script waited. ``num_bytes``: bytes sent and received since the last call.
    ``distance``: the norm of what mixing changed.
    """

    round: int
    neighbours: tuple[str, ...]
    wait_s: float
    num_bytes: int
    distance: float


class ScriptPeer:
    """The membership of a script's peer, with what a user is told; `close` ends its links.

    ``start``: the tensors, (1, ...) each, on the CPU. ``state``: what `Membership.state` returned
    when the script made the checkpoint from which it goes on; None: it begins.
    """

    def __init__(self, place: Place, start: Factors, state: Mapping[str, Any] | None) -> None:
        self.place = place
        if state is None:
            try:
                place.ledger.check(0, None, 0)
            except RunError:
                raise RunError(
                    f"{place.ledger.folder} holds a run whose early messages are gone, because"
                    " later checkpoints were saved: load the last one into the script and give its"
                    " state to load_state_dict, or start anew in another state_dir"
                ) from None
        self.membership = Membership(
            place, start, Belief.of(start, MOST_A_ROUND), state, again="from their last checkpoint"
        )
        self.close = self.membership.close
        self._num_bytes = 0

    def join(self) -> None:
        """See `Membership.join`. Warns of neighbours that are not there."""
        self.membership.join(self._tell(f"before round {self.membership.progress.rounds_done}"))
        if absent := self.membership.absent():
            warnings.warn(
                f"{self.place.name} begins without {', '.join(absent)}; what it mixes until they"
                " come is without them",
                stacklevel=2,
            )

    def begin(self, now: Factors) -> None:
        """Send ``now`` as this round's message and begin to mix it.

        Raises RunError if it holds a number that is not finite.
        """
        self.membership.walked(now)
        self.membership.begin(now)

    def end(self) -> Mixed | None:
        """Wait for the round that `begin` began; None if there is none."""
        began_at, number = time.monotonic(), self.membership.progress.rounds_done
        done = self.membership.end(self._tell(f"in round {number}"))
        if done is None:
            return None
        traffic = self.place.network.traffic
        before, self._num_bytes = (
            self._num_bytes,
            sum(traffic.sent_bytes.values()) + sum(traffic.received_bytes.values()),
        )
        mixed = Mixed(
            done.round,
            tuple(done.neighbours),
            time.monotonic() - began_at,
            self._num_bytes - before,
            done.distance,
        )
        self.place.log.emit(
            RoundMixed(
                event="mixed",
                round=mixed.round,
                neighbours=done.neighbours,
                wait_s=mixed.wait_s,
                num_bytes=mixed.num_bytes,
                distance=mixed.distance,
            )
        )
        return mixed

    def average(self, now: Factors) -> tuple[dict[str, Tensor], list[str]]:
        """The average of all peers, of which this one has ``now``, and what a user should know.

        The tensors that mixing changes are ``now`` with the last decisions. If rounds are left,
        this peer leaves them out.
        """
        done, rounds = self.membership.progress.rounds_done, self.place.messages.rounds
        told = []
        if done < rounds:
            told.append(
                f"{self.place.name} has mixed {done} of {rounds} rounds; it leaves out the others:"
                " set rounds in peers.yaml to how often the script mixes"
            )
        consensus, num_peers = self.membership.average(now, self._tell("after its last round"))
        told += self.membership.findings.warnings(num_peers)
        if blamed := self.membership.findings.blamed(num_peers):
            told.append(blamed)
        return {name: tensor[0] for name, tensor in consensus.items()}, told

    def confirm(self, state: Mapping[str, Any]) -> None:
        """Remove the messages that only checkpoints before ``state`` need."""
        self.membership.confirm(Progress(**state["progress"]))

    def _tell(self, when: str) -> Callable[[], None]:
        """A function that says once, after a while, for whom a wait is."""
        told_at: float | None = time.monotonic() + TOLD_S

        def look() -> None:
            nonlocal told_at
            if told_at is not None and time.monotonic() >= told_at:
                told_at, section = None, self.place.section
                late = ", ".join(self.membership.late()) or "nobody"
                warnings.warn(
                    f"{self.place.name} waits {when} for {late}, at most"
                    f" {section.round_limit_s:g} s, or {section.silence_s:g} s without a sign of"
                    " life",
                    stacklevel=2,
                )

        return look
