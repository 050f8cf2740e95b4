"""`dlora.PeerCallback` in a Trainer: its logs, its checkpoints, a crash, the average."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import dlora
from dlora.config.run import Config
from dlora.data.formats import Example
from dlora.errors import ConfigError
from dlora.events.log import read_log
from dlora.run.prepare import prepare
from kit.processes import FORKS, until
from kit.script_peers import LOCK, Sites
from kit.trainer_sites import Hears, InOrder, make_trainer, train_site
from kit.updates import peft_oracle

NAMES = ("east", "west")


@pytest.fixture
def config(make_config: Callable[..., Config]) -> Config:
    return make_config(
        **{"lora.target_modules": ["query", "value"], "peers.count": 2, "train.model_dropout": 0.0}
    )


class Site:
    """A model and rows of one site; `trainer` makes a trainer that mixes every two steps."""

    def __init__(self, config: Config, rows: list[Example], sites: Sites, name: str) -> None:
        self.rows, self.sites, self.name = rows, sites, name
        self.model, self.initial = peft_oracle(config)
        self.folder = sites.folder / "out" / name

    def trainer(self, *others: transformers.TrainerCallback, **arguments: Any) -> InOrder:
        settings: dict[str, Any] = {
            "max_steps": 8,
            "learning_rate": 5e-3,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        with LOCK:
            trainer = make_trainer(
                self.model, self.rows, self.folder, others, **settings | arguments
            )
            trainer.add_callback(
                dlora.PeerCallback(every_steps=2, **self.sites.arguments(self.name))
            )
        return trainer


@pytest.fixture
def both(config: Config, tmp_path: Path) -> dict[str, Site]:
    prepared = prepare(config)
    sites = Sites(tmp_path, NAMES, rounds=4)
    rows = [prepared.data.peers[name] for name in prepared.names]
    return {
        name: Site(config, [*own][:32], sites, name) for name, own in zip(NAMES, rows, strict=True)
    }


def consensus_of(site: Site) -> dict[str, torch.Tensor]:
    return load_file(site.folder / "consensus" / "adapter_model.safetensors")


def test_it_mixes_at_optimiser_steps_logs_to_every_reporter_and_writes_the_average(
    both: dict[str, Site],
) -> None:
    hears = {name: Hears() for name in NAMES}  # added before the callback, as a reporter is
    trainers = {
        name: site.trainer(
            hears[name], per_device_train_batch_size=2, gradient_accumulation_steps=2
        )
        for name, site in both.items()
    }

    def script(name: str) -> list[dict[str, Any]]:
        trainer = trainers[name]
        trainer.train()
        assert trainer.state.global_step == 8
        logged = [entry for entry in trainer.state.log_history if "dlora/round" in entry]
        assert [entry["dlora/round"] for entry in logged] == [0, 1, 2, 3]
        return hears[name].logs

    for logs in both["east"].sites.run(script).values():
        told = [entry for entry in logs if "dlora/round" in entry]
        assert [entry["dlora/round"] for entry in told] == [0, 1, 2, 3]
        for entry in told:
            assert entry["dlora/neighbours"] == 1 and entry["dlora/bytes"] > 1000
            assert entry["dlora/distance"] > 0 and entry["dlora/wait_s"] >= 0
    one, other = (consensus_of(site) for site in both.values())
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for site in both.values():
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            site.model.peft_config["default"].base_model_name_or_path,  # type: ignore[union-attr, index]
            num_labels=2,
        )
        read = peft.get_peft_model_state_dict(
            peft.PeftModel.from_pretrained(base, site.folder / "consensus")
        )
        assert all(torch.equal(read[key], one[key]) for key in one)
        mean = {key: torch.zeros_like(value) for key, value in one.items()}
        for each in both.values():
            own = peft.get_peft_model_state_dict(each.model)
            mean = {key: value + own[key] / 2 for key, value in mean.items()}
        assert all((mean[key] - one[key]).abs().max() < 1e-6 for key in one)


def in_processes(
    config: Config, sites: Sites, plan: Callable[[Callable[[int], Any]], None], steps: int = 8
) -> None:
    """Both sites as processes, which hold the factors of `both`; ``plan`` starts and ends east.

    It gets a function that starts east, which dies after the step that is given (0: never). It must
    leave east's last process joined. Then both sites have the same average, and every edge is mixed
    by both ends or by neither.
    """

    def started(name: str, dies_at: int) -> Any:
        folder = sites.folder / "out" / name
        folder.parent.mkdir(exist_ok=True)
        place, files = NAMES.index(name), sites.arguments(name)
        process = FORKS.Process(
            target=train_site, args=(config, place, files, folder, dies_at, steps), daemon=True
        )
        process.start()
        return process

    west = started("west", 0)
    try:
        plan(lambda dies_at: started("east", dies_at))
        west.join(120)
        said = "".join(path.read_text() for path in (sites.folder / "out").glob("*.out"))
        assert west.exitcode == 0, said[-2000:]
    finally:
        west.kill()
    one, other = (
        load_file(sites.folder / "out" / name / "consensus" / "adapter_model.safetensors")
        for name in NAMES
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    sites.assert_agreed()


@pytest.mark.parametrize(
    ("dies_at", "overlap"),
    [
        (4, False),
        *(pytest.param(*late, marks=pytest.mark.slow) for late in [(1, False), (3, True)]),
    ],
)
def test_a_kill_and_resume_from_checkpoint_keep_every_edge(
    config: Config, tmp_path: Path, dies_at: int, overlap: bool
) -> None:
    """East dies before the first mix, before another one, whose exchange may run beside the
    training, or after one that no checkpoint holds. All rounds are mixed.
    """
    sites = Sites(tmp_path, NAMES, rounds=4, silence_s=20, round_limit_s=60, overlap=overlap)

    def plan(start: Callable[[int], Any]) -> None:
        first = start(dies_at)
        first.join(120)
        assert first.exitcode == -signal.SIGKILL
        state = sites.folder / "out" / "east" / "checkpoint-2" / "trainer_state.json"
        assert state.exists() == (dies_at > 2)
        second = start(0)
        second.join(120)
        assert second.exitcode == 0

    in_processes(config, sites, plan)
    for name in NAMES:
        log = read_log(sites.folder / "state" / name / "log.jsonl")
        assert {event["round"] for event in log if event["event"] == "mixed"} == set(range(4))


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_twenty_kills_at_random_instants_lose_no_edge(config: Config, tmp_path: Path) -> None:
    """Some come between the trainer's checkpoint and our ledger, in both orders."""
    sites = Sites(tmp_path, NAMES, rounds=150, silence_s=60, round_limit_s=300)
    log, drawn, kills = (
        sites.folder / "state" / "east" / "log.jsonl",
        random.Random(15),
        list[int](),
    )

    def rounds() -> int:
        return log.read_text().count('"mixed"') if log.exists() else 0

    def killed(east: Any) -> bool:
        """Kill it somewhere in or after its first round; False: it was done before."""
        before = rounds()
        until(lambda: not east.is_alive() or rounds() > before, "a round")
        time.sleep(drawn.random() * 0.4)
        east.kill()
        east.join()
        return bool(east.exitcode == -signal.SIGKILL)

    def plan(start: Callable[[int], Any]) -> None:
        while len(kills) < 20 and killed(start(0)):
            kills.append(rounds())
        east = start(0)
        east.join(240)
        assert east.exitcode == 0

    in_processes(config, sites, plan, steps=300)
    assert len(kills) == 20, kills


def test_the_best_checkpoint_of_a_site_does_not_touch_the_average(both: dict[str, Site]) -> None:
    trainers = {
        name: site.trainer(
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=name == "west",  # its "best" checkpoint is the worst
        )
        for name, site in both.items()
    }

    def script(name: str) -> None:
        trainers[name].train()
        assert trainers[name].state.best_model_checkpoint is not None

    both["east"].sites.run(script)
    one, other = (consensus_of(site) for site in both.values())
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_training_with_too_few_steps_is_told_and_ends_with_the_rounds_it_has(
    config: Config, tmp_path: Path
) -> None:
    prepared, sites = prepare(config), Sites(tmp_path, NAMES[:1], rounds=4)
    site = Site(config, [*prepared.data.peers[prepared.names[0]]][:32], sites, "east")
    with pytest.warns(UserWarning) as told:
        site.trainer(max_steps=4).train()
    texts = [str(one.message) for one in told]
    assert any("4 steps, which is 2 rounds of 2; peers.yaml says 4" in text for text in texts)
    assert any("has mixed 2 of 4 rounds; it leaves out the others" in text for text in texts)
    assert consensus_of(site)


def test_training_ends_with_the_last_round(
    both: dict[str, Site],
) -> None:
    trainers = {
        name: site.trainer(max_steps=12 if name == "east" else 8) for name, site in both.items()
    }

    def script(name: str) -> int:
        trainers[name].train()
        return int(trainers[name].state.global_step)

    assert both["east"].sites.run(script) == {"east": 8, "west": 8}


def test_wrong_use_is_told(both: dict[str, Site], tmp_path: Path) -> None:
    site = both["east"]
    arguments = site.sites.arguments("east")
    with pytest.raises(ConfigError, match="every_steps 0"):
        dlora.PeerCallback(every_steps=0, **arguments)
    bare = make_trainer(site.model, site.rows, site.folder, max_steps=2, save_strategy="steps")
    bare.args.save_steps = 2
    bare.train()
    with pytest.raises(ConfigError, match=r"made without dlora\.PeerCallback"):
        site.trainer().train(resume_from_checkpoint=True)
