"""A training script as a peer: `dlora.Peer` mixes what the script trains with its neighbours'."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dlora.config.peers_file import PeersFile
from dlora.decentralized.mixing import build_rule
from dlora.decentralized.peer.messages import WIRE_DTYPES, TensorMessages
from dlora.errors import ConfigError, RunError
from dlora.lora.factors import Factors
from dlora.run.ranks import Ranks
from dlora.run.script_manifest import adapter_facts, script_manifest, start_values
from dlora.run.script_member import Member
from dlora.run.script_peer import Mixed, ScriptPeer
from dlora.run.script_tensors import ScriptTensors, rule_for

T = TypeVar("T")


class Peer:
    """Makes a training script a peer: it mixes named tensors with its neighbours (Dec-LoRA).

    ``peers``: the file that `PeersFile` describes, the same at every site. ``name``: of this
    member; ``key``: its key file; ``federation``: the federation file. ``listen``: HOST:PORT on
    which links are accepted; the default is all interfaces at the port of this member's address.
    What is not given comes from DLORA_PEERS, DLORA_NAME, DLORA_KEY, DLORA_FEDERATION and
    DLORA_LISTEN. ``tokenizer`` and ``agree`` (anything that JSON can hold): must be the same at
    every site. The first handshake refuses a site where they differ, or the names, shapes or first
    values of what is mixed, PEFT's config of the adapter, or the frozen weights.

        peer = dlora.Peer("peers.yaml", name="north", key="north.key", federation="federation.yaml")
        with peer.joined(model):
            for step, batch in enumerate(loader, 1):
                ...  # forward, backward, optimiser step
                if step % 20 == 0:
                    peer.mix()
            average = peer.average()

    A crash costs no edge. The script's checkpoint holds the tensors and `state_dict`, which says
    how many lines of the ledger are in those tensors. The ledger and the messages of ``state_dir``
    are on disk before a neighbour hears of them, so they are never behind the checkpoint. After a
    crash the script loads its last checkpoint and goes through the rounds after it again. For these
    rounds it sends nothing new: a message that was kept once never changes. Edges that were
    committed after the checkpoint are added at the next `mix`, each exactly once, from the messages
    on disk: w_ij (sent_j - sent_i), whose other half is at the neighbour. So both ends mix an edge
    or neither, and the mean over peers loses only the local steps since the checkpoint. If an
    exchange ran when the checkpoint was made (``wait`` False), `joined` begins it again. Messages
    are removed once `saved` says that a later checkpoint is on disk.

    Raises ConfigError or IdentityError if this peer cannot take part. One object takes part once.
    """

    def __init__(
        self,
        peers: str | Path | PeersFile | None = None,
        *,
        name: str | None = None,
        key: str | Path | None = None,
        federation: str | Path | None = None,
        listen: str | None = None,
        tokenizer: Any = None,
        agree: Mapping[str, Any] | None = None,
    ) -> None:
        self._member = Member(peers, name, key, federation, listen)
        self.tokenizer, self._agree = tokenizer, agree or {}
        self._loaded: Mapping[str, Any] | None = None
        self._ranks: Ranks | None = None  # from the first `joined` on
        self._site: ScriptPeer | None = None  # in the main rank, while it takes part
        self._tensors: ScriptTensors | None = None  # while it takes part
        self._taken: Factors = {}  # what the round that runs has sent
        self._has_rounds_left = False

    @property
    def name(self) -> str:
        """This member's name."""
        return self._member.name

    @property
    def rounds(self) -> int:
        """How many rounds the run has."""
        return self._member.section.rounds

    @property
    def has_rounds_left(self) -> bool:
        """Whether `mix` can begin another round."""
        return self._has_rounds_left

    @contextlib.contextmanager
    def joined(self, model: nn.Module | Mapping[str, Tensor]) -> Iterator[Peer]:
        """Take part with every parameter of ``model`` that requires a gradient, by its name.

        ``model`` may be a mapping from names to tensors instead. Waits until the neighbours are
        there, at most ``round_limit_s``. Raises NeighbourError if one is in another run, RunError
        if the state folder cannot be used.
        """
        if self._ranks is not None:
            raise RunError("this Peer has taken part already; make another for another training")
        section = self._member.section
        self._ranks = Ranks(2 * section.round_limit_s + 600)
        tensors = ScriptTensors(model)
        rule = rule_for(build_rule(section), section.rule, tensors, self._ranks.are_several)
        now, frozen, facts = tensors.taken(), tensors.fingerprint(), adapter_facts(model)
        messages = TensorMessages(
            shapes=tensors.shapes,
            rule=rule,
            wire=WIRE_DTYPES[section.wire],
            rounds=section.rounds,
            num_peers=self._member.topology.num_peers,
        )
        with contextlib.ExitStack() as held:

            def manifest() -> dict[str, Any]:
                start = start_values(self._member.folder, now, self._loaded is not None)
                return script_manifest(
                    section, tensors.shapes, start, frozen, facts, self.tokenizer, self._agree
                )

            def join() -> None:
                place = held.enter_context(self._member.placed(messages, manifest))
                self._site = ScriptPeer(place, now, self._loaded)
                held.enter_context(contextlib.closing(self._site))
                self._site.join()

            try:
                self._ranks.on_main(join)
                self._tensors = tensors
                self._give(now)
                if self._on_main(lambda site: site.membership.under_way) is not None:
                    # the exchange that ran when the checkpoint was made
                    self._begin(lambda site, now: site.membership.begin(now))
                yield self
            finally:
                self._site = self._tensors = None

    def mix(self, wait: bool | None = None) -> Mixed | None:
        """End a round: send, wait for this round's neighbours, mix in place.

        A neighbour that is late or gone costs its edge and never the run. ``wait`` False: the
        exchange runs while the script trains on, and what it changes is added at the next call, one
        round late; the mean over peers is kept exactly. Then the result is that of the round
        before, or None. ``wait`` None: as ``overlap`` of peers.yaml says. After the last round
        (`has_rounds_left`) nothing happens, with a warning, and the result is None.
        """
        if wait is None:
            wait = not self._member.section.overlap
        before = self._end()
        if not self._has_rounds_left:
            warnings.warn(
                f"all {self.rounds} rounds are mixed; this call mixes nothing: end the loop when"
                " has_rounds_left is false",
                stacklevel=2,
            )
            return before
        self._begin(lambda site, now: site.begin(now))
        return self._end() if wait else before

    def average(self) -> dict[str, Tensor]:
        """The average of all peers: name -> tensor on the CPU, the same bytes at every site.

        It waits until the neighbours have mixed their last round. Call it once, after the last
        `mix`. The script's own tensors keep their values but for decisions that came late.
        """
        self._end()
        now = self._part.taken()
        average, told = self._on_main(lambda site: site.average(now))
        self._give(now)
        for text in told if self._site is not None else ():  # once for all processes of a site
            warnings.warn(text, stacklevel=2)
        return average

    @contextlib.contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it the script's tensors hold ``values``, such as the average; then their own.

        For example: ``with peer.holding(average): model.save_pretrained(folder)``.
        """
        tensors = self._part
        own = {name: tensor[0] for name, tensor in tensors.taken().items()}
        tensors.put(values)
        try:
            yield
        finally:
            tensors.put(own)

    def state_dict(self) -> dict[str, Any]:
        """Which rounds are in the script's tensors now, for its checkpoint; JSON can hold it.

        Save it together with the tensors: before the next `mix`, and after the last one.
        """
        return self._on_main(lambda site: site.membership.state())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: ``state`` is what `state_dict` returned when it was made.

        Load the tensors of the same checkpoint into the model, then call `joined`. Raises
        ConfigError if ``state`` is something else.
        """
        if self._ranks is not None:
            raise RunError(
                "load_state_dict comes before joined, with the tensors of the checkpoint"
            )
        if not isinstance(state, Mapping) or not {"progress", "chain", "belief"} <= state.keys():
            raise ConfigError("load_state_dict takes what state_dict returned, and got other keys")
        self._loaded = dict(state)

    def saved(self, state: Mapping[str, Any]) -> None:
        """Say that a checkpoint with this ``state`` is on disk and that no earlier one is needed.

        Messages that only earlier checkpoints need are removed. Without this call all stay.
        """
        self._on_main(lambda site: site.confirm(state))

    @property
    def _part(self) -> ScriptTensors:
        if self._tensors is None:
            raise RunError("this Peer takes no part now; use it within `with peer.joined(model)`")
        return self._tensors

    def _on_main(self, action: Callable[[ScriptPeer], T]) -> T:
        """Call ``action`` with the main rank's part; all ranks get the result."""
        assert self._part and self._ranks is not None

        def act() -> T:
            assert self._site is not None  # this is the main rank
            return action(self._site)

        return self._ranks.on_main(act)

    def _begin(self, begin: Callable[[ScriptPeer, Factors], object]) -> None:
        """Begin a round's exchange with copies of the script's tensors."""
        self._taken = now = self._part.taken()
        self._on_main(lambda site: begin(site, now))
        self._train_next()

    def _end(self) -> Mixed | None:
        """Wait for the round that runs and give the script what it changed."""
        mixed = self._on_main(lambda site: site.end()) if self._part and self._taken else None
        if mixed is not None:
            self._give(self._taken)
        self._taken = {}
        return mixed

    def _give(self, taken: Factors) -> None:
        """Give the script what has changed in the site's copies since they were ``taken``."""
        assert self._ranks is not None
        changed = (
            {name: torch.empty_like(tensor) for name, tensor in taken.items()}
            if self._site is None
            else self._site.membership.factors
        )
        self._part.give(taken, self._ranks.shared(changed))
        self._train_next()

    def _train_next(self) -> None:
        """Train what the next round trains."""
        names, self._has_rounds_left = self._on_main(
            lambda site: (site.membership.names, site.membership.has_rounds_left)
        )
        self._part.train_only(names)
