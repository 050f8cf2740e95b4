"""Takes local steps: model, factors and batches in; changed factors and losses out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dlora.config.training import TrainSection
from dlora.data.batches import Batch
from dlora.lora.active import ActiveUnits, Scheduled
from dlora.lora.factors import Factors, Zeros, stack
from dlora.lora.moments import Moments, leaf_rows
from dlora.lora.stacked import StackedModel
from dlora.tasks.losses import num_targets, summed_loss


class Group:
    """Participants ``first`` to ``last - 1``, which share each forward pass, and their optimiser.

    ``factors`` are those of these participants, and ``parameters`` are views of them, so a local
    step changes the factors themselves.
    With a schedule, ``units`` decides which tensors take part in a step, and the optimiser has a
    separate tensor for each participant. ``spans``: rows whose participants have taken equally many
    steps, if not all have; the optimiser then has a tensor for each of them. ``kept``: as for
    `ActiveUnits`.
    """

    def __init__(
        self,
        factors: Factors,
        first: int,
        last: int,
        section: TrainSection,
        scheduled: Scheduled | None = None,
        spans: Sequence[slice] = (),
        kept: Factors | None = None,
    ) -> None:
        self.first, self.last, self.spans = first, last, spans
        self.parameters = {name: tensor.detach() for name, tensor in factors.items()}
        trained = list(self.parameters.values())
        self.units = (
            None
            if scheduled is None
            else ActiveUnits(self.parameters, range(first, last), scheduled, kept)
        )
        self.leaves = self.parameters if self.units is None else self.units.leaves
        if spans:
            self.leaves = {
                f"{name}@{span.start}": tensor[span].detach()
                for name, tensor in self.parameters.items()
                for span in spans
            }
            trained = list(self.leaves.values())
        optimizer: Any = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[section.optimizer]
        self.optimizer: torch.optim.Optimizer = optimizer(
            trained if self.units is None else self.units.parameter_groups(),
            lr=section.learning_rate,
            weight_decay=section.weight_decay,
            # one pass over the memory instead of ten
            fused=trained[0].device.type in ("cpu", "cuda"),
        )

    def train_only(self, names: frozenset[str]) -> None:
        """Compute gradients only for ``names``; tensors without a gradient take no step."""
        if self.units is not None:
            self.units.train_only(names)
            return
        for name, tensor in self.parameters.items():
            tensor.requires_grad_(name in names)

    def all_gradients(self) -> list[Tensor]:
        """The gradient of every tensor that trains, zeros where the backward pass wrote none."""
        trained = [tensor for tensor in self.parameters.values() if tensor.requires_grad]
        for tensor in trained:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        return [tensor.grad for tensor in trained if tensor.grad is not None]

    def step(self, learning_rate: float, max_grad_norm: float | None) -> None:
        """Clip the gradients, take the optimiser's step with them, and delete them."""
        scores: list[dict[int, float]] = []
        if self.units is not None:
            self.units.mask_gradients()
            scores = self.units.scores()  # before clipping, which depends on who is active
        if max_grad_norm is not None:
            clip_each(
                [tensor for tensor in self.parameters.values() if tensor.requires_grad],
                max_grad_norm,
            )
        if self.units is not None:
            self.units.step(self.optimizer, learning_rate, scores)
            return
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = learning_rate
        for name, tensor in self.parameters.items() if self.spans else ():
            for span in self.spans:
                gradient = tensor.grad
                self.leaves[f"{name}@{span.start}"].grad = (
                    None if gradient is None else gradient[span]
                )
            tensor.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()


class Participants:
    """The factors of the participants of this process, (P, ...) each, and the groups that train
    them. ``first``: the number of the first of them among all participants of the run.

    ``zeros`` makes what is kept of all of them: factors, moments, dropped units. None: all is in
    memory. Gradients exist for the group that trains.
    """

    def __init__(
        self,
        initial: Mapping[str, Tensor],
        groups: Sequence[range],
        section: TrainSection,
        device: torch.device,
        scheduled: Scheduled | None = None,
        zeros: Zeros | None = None,
    ) -> None:
        self.first, self.zeros = groups[0].start, zeros
        self.factors = stack(initial, groups[-1].stop - self.first, device, zeros)
        self._moments: dict[tuple[str, str], Tensor] = {}  # those that `rest` keeps, (P, ...) each
        kept: Factors = {}
        if zeros is not None and scheduled is not None:
            kept = {
                name: zeros(tensor.shape)
                for name, tensor in self.factors.items()
                if scheduled.leaves_out(name)
            }
        self.groups = [
            Group(
                self._rows(self.factors, group),
                group.start,
                group.stop,
                section,
                scheduled,
                kept=self._rows(kept, group) if kept else None,
            )
            for group in groups
        ]

    def _rows(self, factors: Factors, group: range) -> Factors:
        rows = slice(group.start - self.first, group.stop - self.first)
        return {name: tensor[rows] for name, tensor in factors.items()}

    @torch.no_grad()
    def rest(self, group: Group) -> None:
        """Move the moments of a group, which has trained, to where those of all are kept."""
        if self.zeros is None:
            return
        for leaf, parameter in group.leaves.items():
            name, first = leaf_rows(leaf, group.first)
            state = group.optimizer.state.get(parameter, {})
            for key, value in state.items():
                if not isinstance(value, Tensor) or not value.dim():
                    continue  # a count of steps
                if (name, key) not in self._moments:
                    self._moments[name, key] = self.zeros(self.factors[name].shape)
                rows = slice(first - self.first, first - self.first + len(value))
                kept = self._moments[name, key][rows]
                if kept.data_ptr() != value.data_ptr():
                    state[key] = kept.copy_(value)

    def standing(self, factors: Mapping[str, Tensor] | None = None) -> Factors:
        """The factors, (P, ...) each, as they are scored and exported: dropped units do nothing.

        ``factors``: copies of them; None: the factors themselves.
        """
        factors = self.factors if factors is None else factors
        standing = dict(factors)
        for group in self.groups:
            if group.units is None:
                continue
            for name, participant in group.units.left_out():
                if standing[name] is factors[name]:
                    standing[name] = (
                        self.zeros(factors[name].shape).copy_(factors[name])
                        if self.zeros
                        else factors[name].clone()
                    )
                standing[name][group.first - self.first + participant] = (
                    group.units.scheduled.dropped(name)
                )
        return standing

    def took_part(self) -> list[frozenset[str]]:
        """For each participant, names of the tensors that its last local steps may have changed.

        It must send these tensors.
        """
        return [
            frozenset(group.parameters)
            if group.units is None
            else group.units.took_part(participant)
            for group in self.groups
            for participant in range(group.last - group.first)
        ]

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimisers' moments and step counts as flat names -> tensors, for a checkpoint."""
        return {
            f"{group.first}/{name}/{key}": value
            for group in self.groups
            for name, tensor in group.leaves.items()
            for key, value in group.optimizer.state.get(tensor, {}).items()
            if isinstance(value, Tensor)
        }

    def load(self, factors: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]) -> None:
        """Restore factors and optimiser from a checkpoint, whose groups may be others."""
        for name, tensor in factors.items():
            self.factors[name].copy_(tensor)
        moments = Moments(optimizer_state)
        for group in self.groups:
            for leaf, parameter in group.leaves.items():
                name, first = leaf_rows(leaf, group.first)
                found = moments.of(name, range(first, first + len(parameter)))
                if found:
                    group.optimizer.state[parameter] = {
                        key: value.to(parameter.device) for key, value in found.items()
                    }
            self.rest(group)


def local_steps(
    model: StackedModel,
    group: Group,
    batches: Iterable[Sequence[Batch]],
    learning_rates: Sequence[float],
    section: TrainSection,
    autocast_dtype: torch.dtype | None = None,
    on_step: Callable[[int], None] = lambda num_participants: None,
    add_up: Callable[[Sequence[Tensor]], object] | None = None,
) -> Tensor:
    """Train one group; each entry of ``batches`` holds the micro-batches of one optimiser step.

    Each participant minimises the mean loss over its own targets in the step. The stack minimises
    the sum of these means, so a participant's gradient does not depend on the others. Returns the
    losses (steps, P) on the CPU. ``on_step(num_participants)`` is called after each step.
    ``add_up`` replaces tensors by their sums over the processes that train these participants
    together, each on a part of the rows; None: this process has all rows.
    """
    model.network.train()
    if group.units is not None:
        group.units.leave_out()
    num_participants = group.last - group.first
    history: list[Tensor] = []
    for micro_batches, learning_rate in zip(batches, learning_rates, strict=True):
        model.use(group.parameters, group.units.killed if group.units else frozenset())
        targets_P = torch.zeros(num_participants, dtype=torch.int64)
        for batch in micro_batches:
            targets_P += num_targets(model.task, batch.labels, num_participants)
        if add_up is not None:
            add_up([targets_P])
        targets_P.clamp_(min=1)  # a step without targets must not divide by zero
        loss_P = torch.zeros(num_participants)
        for batch in micro_batches:
            batch = batch.to(model.device)
            with autocast(model.device, autocast_dtype):
                logits = forward(model, batch)
            micro_loss_P = summed_loss(model.task, logits, batch.labels, num_participants)
            micro_loss_P = micro_loss_P / targets_P.to(model.device)
            micro_loss_P.sum().backward()
            loss_P += micro_loss_P.detach().cpu()
        if add_up is not None:
            model.passes_done(backward=True)
            add_up([loss_P, *group.all_gradients()])
        group.step(learning_rate, section.max_grad_norm)
        history.append(loss_P)
        on_step(num_participants)
    if group.units is not None:
        group.units.put_back()
    return torch.stack(history)


def forward(model: StackedModel, batch: Batch) -> Tensor:
    """Logits: (P x B, classes), or (P x B, L, vocabulary) for a language model."""
    arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.token_type_ids is not None:
        arguments["token_type_ids"] = batch.token_type_ids
    model.pass_begins()
    logits: Tensor = model.network(**arguments, **model.inputs_for(batch.labels)).logits
    return logits


@torch.no_grad()
def clip_each(parameters: Sequence[Tensor], max_norm: float) -> None:
    """Scale each participant's gradient down to ``max_norm``, as torch's clip_grad_norm_ does."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients]
    norm_P = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    factor_P = (max_norm / (norm_P + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor_P.view(-1, *[1] * (gradient.dim() - 1)))


def learning_rate(section: TrainSection, step: int, num_steps: int) -> float:
    """The learning rate of local step ``step`` (from 0) of ``num_steps``.

    It is the rate of transformers' schedule of the same name.
    """
    if step < section.warmup_steps:
        return section.learning_rate * step / section.warmup_steps
    progress = (step - section.warmup_steps) / max(1, num_steps - section.warmup_steps)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return section.learning_rate * max(0.0, shape[section.lr_scheduler_type])


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """A context for arithmetic in ``dtype``, or one that changes nothing if it is None.

    Trained tensors stay float32.
    """
    return torch.autocast(device.type, dtype=dtype) if dtype is not None else nullcontext()


def activation_bytes(
    model: StackedModel, factors: Factors, batch: Batch, autocast_dtype: torch.dtype | None
) -> int:
    """Bytes that one forward pass keeps for its backward pass.

    They are the distinct storages that autograd saves, without those of parameters.
    """
    model.use({name: tensor.detach().requires_grad_() for name, tensor in factors.items()})
    weights = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*model.network.parameters(), *model.network.buffers(), *factors.values())
        if not isinstance(tensor, DTensor)  # a part of a divided weight: a pass gathers the whole
    }
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    model.network.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        autocast(model.device, autocast_dtype),
    ):
        logits = forward(model, batch.to(model.device))
    del logits
    # the gathered weights of a sharded model are empty again
    return sum(storage.nbytes() for storage in kept.values())
