"""`peers.overlap`: the exchange of a round runs while the next local steps do, and what it changes
is added one round later. Law 5, and the mean over peers; law 10 is in test_scheduled_peers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlora
from dlora.config.peers import PeersSection, TopologySection
from dlora.decentralized.gossip import Gossip
from dlora.decentralized.mixing import build_rule
from dlora.decentralized.topology import build_topology
from dlora.net.counting import MemoryTransport
from kit.scheduled_peers import ALL, KR, OVERLAP, MakeConfig, Peers, federation
from kit.script_peers import Sites
from kit.updates import UPDATE_BOUND, assert_same, update_of

pytestmark = pytest.mark.usefixtures("no_page")


def test_a_difference_is_added_one_round_later_and_the_mean_is_kept() -> None:
    """x <- x + local steps + (W - I) of what was sent a round before."""
    topology = build_topology(TopologySection(), None, ["a", "b", "c", "d"])
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(5, 4, 3, generator=generator, dtype=torch.float64)
    factors = {"x": torch.zeros(4, 3, dtype=torch.float64)}
    rule = build_rule(PeersSection())
    gossip = Gossip(
        factors, topology, rule, MemoryTransport(torch.float64), torch.float64, overlap=True
    )
    expected, late = torch.zeros_like(factors["x"]), torch.zeros_like(factors["x"])
    for number, step in enumerate(steps):

        def train(names: frozenset[str], step: Tensor = step) -> Tensor:
            factors["x"] += step
            return torch.zeros(4)

        gossip.round(number, train)
        expected = expected + step + late
        late = torch.tensor(topology.mixing(number).toarray()) @ expected - expected
        torch.testing.assert_close(factors["x"], expected)
    gossip.settle()
    torch.testing.assert_close(factors["x"], expected + late)
    torch.testing.assert_close(factors["x"].mean(0), steps.sum(0).mean(0))


@pytest.mark.parametrize(
    ("schedule", "more"),
    [
        (ALL, {"train.optimizer": "adamw"}),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in [
                (ALL, {"train.optimizer": "sgd", "peers.wire": "bfloat16"}),
                (ALL, {"peers.rule": "alternate", "peers.period": 1}),
                ({**KR, "on_kill": "drop"}, {}),
            ]
        ),
    ],
)
def test_peers_are_their_simulation(
    make_config: MakeConfig, tmp_path: Path, schedule: dict[str, Any], more: dict[str, Any]
) -> None:
    config = federation(make_config, schedule, **more, **OVERLAP)
    dlora.simulate(config)
    peers = Peers(config, tmp_path / "peers")
    peers.run()
    for name, own in peers.configs.items():
        for adapter in ("consensus", f"peers/{name}"):
            update, reference = (
                update_of(config, Path(folder, adapter))
                for folder in (own.output_dir, config.output_dir)
            )
            assert_same(update, reference, UPDATE_BOUND["adamw"], config.task)


def test_a_script_goes_on_from_a_checkpoint_made_while_an_exchange_ran(tmp_path: Path) -> None:
    """East stops after its third round, whose exchange runs, and goes on from a checkpoint of the
    second: no round is left out, and the sum over sites lacks the lost local steps only.
    """
    names, rounds = ("east", "north", "west"), 6
    sites = Sites(tmp_path, names, rounds=rounds, silence_s=30, overlap=True)

    def step(name: str, number: int) -> Tensor:
        drawn = torch.Generator().manual_seed(100 * names.index(name) + number)
        return torch.randn(5, generator=drawn)

    def script(name: str) -> tuple[Tensor, int]:
        value, first, checkpoint, calls = nn.Parameter(torch.zeros(5)), 0, None, 0
        for lives in (3, rounds) if name == "east" else (rounds,):
            peer = sites.peer(name)
            if checkpoint is not None:
                first, value = checkpoint[0], nn.Parameter(checkpoint[1])
                peer.load_state_dict(checkpoint[2])
            with peer.joined({"value": value}):
                for number in range(first, lives):
                    assert peer.has_rounds_left
                    with torch.no_grad():
                        value.add_(step(name, number))
                    peer.mix()
                    calls += 1
                    if number == 1:
                        saved = value.detach().clone(), peer.state_dict()
                        checkpoint = (number + 1, *saved)
                if lives == rounds:
                    assert not peer.has_rounds_left
                    peer.average()
        return value.detach(), calls

    told = sites.run(script)
    assert {name: calls for name, (_, calls) in told.items()} == {
        "east": 3 + 4,
        "north": rounds,
        "west": rounds,
    }
    steps = [step(name, number) for name in names for number in range(rounds)]
    total = torch.stack([value for value, _ in told.values()]).sum(0)
    assert torch.allclose(total, torch.stack(steps).sum(0), atol=1e-5)
    sites.assert_agreed()


def test_who_missed_the_end_and_who_did_not_go_on_to_one_average(tmp_path: Path) -> None:
    """East dies before its last round, so north ends with an average of its own. Both go on from
    checkpoints that were made while an exchange ran.
    """
    sites = Sites(tmp_path, ("east", "north"), rounds=3, silence_s=3, overlap=True)

    def script(name: str, start: tuple[int, Tensor, Any], lives: int) -> Any:
        first, value, state = start[0], nn.Parameter(start[1]), start[2]
        peer = sites.peer(name)
        if state is not None:
            peer.load_state_dict(state)
        with peer.joined({"value": value}):
            for number in range(first, lives):
                with torch.no_grad():
                    value.add_(float(number + len(name)))
                peer.mix()
                if number == 1:
                    start = (2, value.detach().clone(), peer.state_dict())
            return start, peer.average()["value"] if lives == 3 else None

    begun = (0, torch.zeros(2), None)
    with pytest.warns(UserWarning, match="the average is of 1 of 2 peers"):
        ended = sites.run(lambda name: script(name, begun, 2 if name == "east" else 3))
    again = sites.run(lambda name: script(name, ended[name][0], 3))
    assert torch.equal(again["east"][1], again["north"][1])
    assert not torch.equal(again["north"][1], ended["north"][1])
    sites.assert_agreed()
