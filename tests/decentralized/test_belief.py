"""What is believed of a neighbour: no honest run is ever refused, and a message from nowhere is not
mixed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dlora
from dlora.config.run import Config
from dlora.decentralized.peer.belief import FAR, NEAR, Belief, Implausible
from dlora.events.log import read_log
from kit import lying_messages, tiny_models
from kit.processes import Federation, running
from kit.scheduled_peers import KR, RANDOM, Peers, federation

MakeConfig = Callable[..., Config]


def factors(value: float) -> dict[str, torch.Tensor]:
    return {"x": torch.full((1, 4), value)}


def test_what_is_far_beyond_this_peers_own_way_is_refused() -> None:
    belief = Belief(initial=0.0, step=1.0)
    belief.walked(factors(0.0), factors(0.5))  # a way of 1
    assert belief.reach(0) == 2.0
    belief.judge("b", 0, factors(0.5), factors(0.5 + 0.99 * FAR))
    for value in (2.0 * FAR, 1e30, 1e38, math.inf, math.nan):
        with pytest.raises(Implausible, match="away from this peer's own"):
            belief.judge("c", 0, factors(0.5), factors(value))


def test_an_edge_that_has_a_history_is_held_to_it_and_a_liar_cannot_stretch_it() -> None:
    belief = Belief(initial=0.0, step=1.0)
    belief.walked(factors(0.0), factors(0.5))
    belief.judge("b", 0, factors(0.0), factors(1.0))
    with pytest.raises(Implausible):
        belief.judge("b", 0, factors(0.0), factors(1.1 * NEAR))
    belief.judge("c", 0, factors(0.0), factors(1.1 * NEAR))  # of c nothing is known yet
    for _ in range(100):  # each time as much as is taken
        belief.judge("b", 0, factors(0.0), factors(0.49 * belief.limit("b", 0)))
    assert belief.limit("b", 0) == FAR * belief.reach(0)
    resumed = Belief(initial=0.0, step=1.0)
    resumed.load(json.loads(json.dumps(belief.state())))
    assert resumed == belief


def test_rounds_that_were_skipped_count_as_those_that_were_trained() -> None:
    belief = Belief(initial=0.0, step=1.0)
    belief.walked(factors(0.0), factors(0.5))
    assert belief.reach(99) == 100 * belief.reach(0)
    assert Belief(initial=0.0, step=1.0).reach(9) == 10.0, (
        "who has not trained yet goes by its learning rate"
    )


# schedule, config, what is the first peer's own
HONEST: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "one site's learning rate is 30 times the others'": (
        {"kind": "all"},
        {"train.learning_rate": 1e-3},
        {"learning_rate": 3e-2},
    ),
    "one site alone warms up": ({"kind": "all"}, {"train.local_steps": 1}, {"warmup_steps": 100}),
    "a learning rate of 1": ({"kind": "all"}, {"train.learning_rate": 1.0}, {}),
    "SGD without clipping": (
        {"kind": "all"},
        {"train.optimizer": "sgd", "train.learning_rate": 0.5, "train.max_grad_norm": None},
        {},
    ),
    "a tiny learning rate over bfloat16": (
        {"kind": "all"},
        {"train.learning_rate": 1e-9, "peers.wire": "bfloat16"},
        {},
    ),
    "a falling rate": (
        {"kind": "all"},
        {"train.lr_scheduler_type": "linear", "train.rounds": 8},
        {},
    ),
    "cores and random units that drop": (
        {**RANDOM, "on_kill": "drop"},
        {"lora.placement": "core"},
        {},
    ),
    "Kill and Revive that drops": ({**KR, "on_kill": "drop"}, {}, {}),
    "B alone": ({"kind": "all"}, {"peers.rule": "ffa"}, {}),
}


@pytest.mark.parametrize(
    "what",
    [
        name if index < 2 else pytest.param(name, marks=pytest.mark.slow)
        for index, name in enumerate(HONEST)
    ],
)
def test_no_honest_run_is_refused(what: str, make_config: MakeConfig, tmp_path: Path) -> None:
    """Law: the bound is for liars. Prints how near to it an honest message ever came."""
    schedule, changes, own = HONEST[what]
    peers = Peers(federation(make_config, schedule, **changes), tmp_path / "peers")
    first = peers.configs["north"]
    peers.configs["north"] = first.model_copy(update={"train": first.train.model_copy(update=own)})
    shares: list[float] = []
    judge = Belief.judge

    def noted(
        belief: Belief, neighbour: str, round: int, one: dict[str, Any], other: dict[str, Any]
    ) -> None:
        before = belief.limit(neighbour, round)
        judge(belief, neighbour, round, one, other)
        shares.append(max(belief.seen.values()) / before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Belief, "judge", noted)
        peers.run()
    events = [
        event
        for name in peers.configs
        for event in read_log(Path(peers.configs[name].output_dir, "log.jsonl"))
    ]
    assert [event for event in events if event["event"] == "implausible"] == []
    assert (
        sum(event["event"] == "edge" and event["committed"] for event in events)
        == 4 * peers.configs["north"].train.rounds
    )
    print(f"{what}: of {len(shares)} messages the farthest was at {max(shares):.4f} of the bound")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lie", ["1e30", "1e3"])
def test_one_number_ends_nobodys_run(
    lie: str, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    """A member whose messages of rounds 3 and 4 hold 1e30 or 1e3 is named, and its edges are left
    out at both ends.

    Honest peers end within 2 points of the run without the lie, all commits can be resumed, and the
    ledgers agree.
    """
    changes = {"train.rounds": 8, "train.local_steps": 4, "peers.silence_s": 60.0}
    peers = Federation(tmp_path, model_folder("bert"), changes, names=("north", "east", "south"))
    tiny_models.write_rows(tmp_path / "eval.jsonl", 200, start=100)
    honest = [name for name in peers.names if name != "south"]
    with running(peers):
        for name in honest:
            peers.start(name)
        peers.start_as("south", lying_messages.lie, lie, 3, 4)
        outcomes = peers.finish_all(300.0)
        for name in honest:
            assert outcomes[name].exit_code in (0, 3), outcomes
            refused = peers.events(name, "implausible")
            assert {(event["neighbour"], event["message"]) for event in refused} == {
                ("south", "round-000003"),
                ("south", "round-000004"),
            }
            left_out = {key for key, state in peers.ledger(name).items() if state == "dropped"}
            assert left_out <= {(3, "south"), (4, "south")}
        for name in peers.names:  # both ends of every edge tell one story
            for (round, neighbour), state in peers.ledger(name).items():
                assert peers.ledger(neighbour).get((round, name), "dropped") == state
        for name in peers.names:  # the liar is honest now
            peers.start(name, "--resume")
        peers.finish_all(300.0)
    undisturbed = dlora.simulate(peers.config)["runs"]["dec-lora"]["consensus"]["accuracy"]
    for name in honest:
        reached = peers.summary(name)["runs"]["dec-lora"]
        print(f"{name}: {reached['consensus']['accuracy']:.3f}, undisturbed {undisturbed:.3f}")
        assert reached["consensus_peers"] == 3
        assert abs(reached["consensus"]["accuracy"] - undisturbed) <= 0.02
