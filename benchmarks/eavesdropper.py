"""What a curious cloud keeps of a session, and what it reads out of that.

The attacker follows the protocol, knows the public model and keeps the frames.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dlora.config.run import Config
from dlora.data.batches import Batch
from dlora.model.load import load_tokenizer
from dlora.split.cloud.body import Body
from dlora.split.cloud.limits import Budget, Limits
from dlora.split.cloud.session import Session
from dlora.split.device.half import Half, load_half
from dlora.split.tensors import bits
from dlora.train import Participants, forward, local_steps
from dlora.wire.split.codec import decode_split, encode_split
from dlora.wire.split.frames import Begin, SplitFrame, Values, Wire

PATIENCE_S = 120.0  # for a frame that must come


# What the attacker has


@dataclass
class Part:
    """One part's way through the body, as the cloud sees it; ``inputs`` and ``updates`` by
    unit.
    """

    begin: Begin
    inputs: dict[int, Tensor] = field(default_factory=dict)  # (N, I)
    updates: dict[int, Tensor] = field(default_factory=dict)  # (N, sum of O)
    hidden: Tensor | None = None
    gradient: Tensor | None = None  # of the loss by hidden; None: no training

    def row_means(self, of: Tensor) -> Tensor:
        """(N, width) -> (rows, width), for a head that reads the mean over a text's tokens."""
        mask = bits(self.begin.mask, self.begin.rows * self.begin.columns).reshape(
            self.begin.rows, -1
        )
        return torch.stack([own.mean(0) for own in torch.split(of, mask.sum(1).tolist())])


class Tap:
    """A link over which frames become bytes and are read again, and the cloud at its end, which
    keeps them all.
    """

    def __init__(self, body: Body, wire: Wire) -> None:
        self.body, self.wire, self.frames = body, wire, list[SplitFrame]()
        self._down: queue.Queue[SplitFrame] = queue.Queue()
        self._session = Session(
            "device", body, Limits(1 << 20, 16, PATIENCE_S), Budget(1 << 40), self._say
        )

    def send(self, frame: SplitFrame) -> None:
        """Up."""
        self._session.hear(self._carried(frame))

    def receive(self) -> SplitFrame:
        """Down."""
        return self._down.get(timeout=PATIENCE_S)

    def parts(self) -> list[Part]:
        """All that went over the link, part by part."""
        found: dict[tuple[int, int], Part] = {}
        for frame in self.frames:
            if isinstance(frame, Begin):
                found[frame.call, frame.part] = Part(frame)
            elif isinstance(frame, Values):
                part = found[frame.call, frame.part]
                match frame.what:
                    case "input":
                        part.inputs[frame.unit] = frame.tensor
                    case "update":
                        part.updates[frame.unit] = frame.tensor
                    case "hidden":
                        part.hidden = frame.tensor
                    case "hidden-gradient":
                        part.gradient = frame.tensor
        return list(found.values())

    def close(self) -> None:
        """End the session."""
        self._session.close()

    def _say(self, frame: SplitFrame) -> None:
        self._down.put(self._carried(frame))

    def _carried(self, frame: SplitFrame) -> SplitFrame:
        carried = decode_split(encode_split(frame, self.wire), self.wire)
        self.frames.append(carried)
        return carried


# What it makes of it


def tokens_of(embedded: Tensor, table_VE: Tensor) -> Tensor:
    """The nearest row of the public token embedding for each embedded token: ids (N,)."""
    distinct, places = torch.unique(embedded, dim=0, return_inverse=True)
    rows = table_VE.double()  # tokens that training hardly met lie close together
    norms = rows.square().sum(1)
    return torch.cat(
        [(norms - 2 * own.double() @ rows.T).argmin(1) for own in torch.split(distinct, 512)]
    )[places]


def labels_of(
    hidden: Tensor, gradient: Tensor, head: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The class y whose (p - e_y) W points as the gradient does, for a head (W, b) that is known;
    and how well it fits.

    Both (rows,). Every positive scale of the gradient gives the same answer, so nothing of the
    batch need be known.
    """
    weight, bias = head
    p_W = F.linear(hidden, weight, bias).softmax(1) @ weight
    along = (gradient * p_W).sum(1, keepdim=True) - gradient @ weight.T
    lengths = (
        (p_W.square().sum(1, keepdim=True) - 2 * p_W @ weight.T + weight.square().sum(1))
        .clamp_min(1e-30)
        .sqrt()
    )
    fits = along / lengths / gradient.norm(dim=1, keepdim=True).clamp_min(1e-30)
    best, labels = fits.max(1)
    return labels, best


def sides_of(gradients: Tensor) -> Tensor:
    """For two classes and a head nobody knows: on which side of the gradients' main axis each lies,
    0 or 1, (rows,).
    """
    axis: Tensor = torch.linalg.svd(F.normalize(gradients, dim=1), full_matrices=False).Vh[0]
    return (gradients @ axis > 0).long()


def delta_weight_of(x: Tensor, update: Tensor, r: int) -> Tensor:
    """scaling x B A, (O, I), by least squares from tokens (N, I) and their updates (N, O).

    ``r``: the LoRA rank, which shows in the updates; what does not fit it is rounding, and is left
    out. Directions that the tokens hardly have are left out too.
    """
    x, update = x.double(), update.double()
    axes = torch.linalg.svd(update, full_matrices=False).Vh[:r]
    solution: Tensor = torch.linalg.lstsq(
        x, update @ axes.T @ axes, rcond=1e-6, driver="gelsd"
    ).solution
    return solution.T


def unmask(embedded: Tensor, table_VE: Tensor) -> Tensor:
    """Ids (N,) of tokens that all had the same secret vector taken away (PrivSplit, algorithm 1):
    differences are public.

    Two tokens are tried until E_i - E_j is their difference for some i, j; that gives the vector,
    and it all the rest.
    """
    direction = torch.randn(table_VE.shape[1], generator=torch.Generator().manual_seed(0))
    along, order = (table_VE @ direction).sort()
    wanted = table_VE - (embedded[0] - embedded[1])  # E_j, if the first token is i
    places = torch.searchsorted(along, wanted @ direction).unsqueeze(1) + torch.arange(-8, 8)
    candidates = order[places.clamp(0, len(along) - 1)]  # (V, 16)
    gaps = [
        (table_VE[near] - own.unsqueeze(1)).norm(dim=2).amin(1)
        for near, own in zip(torch.split(candidates, 1024), torch.split(wanted, 1024), strict=True)
    ]
    return tokens_of(embedded - embedded[0] + table_VE[torch.cat(gaps).argmin()], table_VE)


# The sessions it watches


@dataclass
class Watched:
    """A session, and the truth, which only scoring looks at."""

    parts: list[Part]  # of each batch of ``batches``: STEPS of training, then an evaluation
    batches: list[Batch]
    num_steps: int
    half: Half
    factors: list[dict[str, Tensor]]  # as they were for each batch

    def tokens(self, public: Tensor) -> tuple[float, float]:
        """Share of the tokens, and of the whole texts, that are read right."""
        masks = [batch.attention_mask.bool() for batch in self.batches]
        truth = torch.cat(
            [batch.input_ids[mask] for batch, mask in zip(self.batches, masks, strict=True)]
        )
        hits = tokens_of(torch.cat([part.begin.embedded for part in self.parts]), public) == truth
        texts = torch.split(hits, torch.cat([mask.sum(1) for mask in masks]).tolist())
        return (
            hits.float().mean().item(),
            torch.stack([text.all() for text in texts]).float().mean().item(),
        )

    def top(self, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states and their gradients in training, a row for each label, and the labels."""
        trained = list(zip(self.parts, self.batches, strict=True))[: self.num_steps]
        hidden, gradient, labels = [], [], []
        for part, batch in trained:
            assert part.hidden is not None and part.gradient is not None
            hidden.append(part.row_means(part.hidden) if mean else part.hidden)
            gradient.append(part.row_means(part.gradient) if mean else part.gradient)
            labels.append(
                batch.labels if mean else batch.labels[:, 1:][batch.labels[:, 1:] != -100]
            )
        return torch.cat(hidden), torch.cat(gradient), torch.cat(labels)

    def adapter(
        self, seen: Sequence[int], num_tokens: int | None, other: int
    ) -> tuple[int, float, float]:
        """Tokens of the batches ``seen`` (the first ``num_tokens``), and the relative errors of the
        adapter got from them.

        Of its weights, all modules together; and of what it adds to the tokens of batch ``other``.
        """
        sums, count = torch.zeros(4, dtype=torch.float64), 0
        prefix = self.half.model.body.prefix
        for number, unit in enumerate(self.half.agreement.units):
            x = torch.cat([self.parts[place].inputs[number] for place in seen])[:num_tokens]
            updates = torch.cat([self.parts[place].updates[number] for place in seen])[:num_tokens]
            count, elsewhere = len(x), self.parts[other].inputs[number].double()
            for module, update in zip(
                unit.modules, torch.split(updates, list(unit.out_features), dim=1), strict=True
            ):
                a, b = (
                    self.factors[seen[0]][f"{prefix}{module}.lora_{factor}"][0].double()
                    for factor in "AB"
                )
                truth = (
                    float(self.half.model.network.get_submodule(prefix + module).scaling) * b @ a
                )
                error = delta_weight_of(x, update, len(a)) - truth
                products = error, truth, elsewhere @ error.T, elsewhere @ truth.T
                sums += torch.stack([product.square().sum() for product in products])
        return count, (sums[0] / sums[1]).sqrt().item(), (sums[2] / sums[3]).sqrt().item()


def watch(config: Config, body: Body, batches: Sequence[Batch], num_steps: int) -> Watched:
    """Train one device a step on each of the first batches and let it evaluate on the others,
    watched by its cloud.
    """
    assert config.split is not None
    names = config.data.labels if config.task == "classification" else None
    half, tap = load_half(config, load_tokenizer(config.model), names), Tap(body, config.split.wire)
    half.link(lambda: tap, 1, lambda seconds: None)
    group = Participants(half.model.initial, [range(1)], config.train, torch.device("cpu")).groups[
        0
    ]
    group.train_only(frozenset(group.parameters))
    factors = []
    for number, batch in enumerate(batches):
        factors.append({name: tensor.detach().clone() for name, tensor in group.parameters.items()})
        if number < num_steps:
            local_steps(half.model, group, [[batch]], [config.train.learning_rate], config.train)
        else:
            half.model.network.eval()
            with torch.no_grad():
                forward(half.model, batch)
    tap.close()
    return Watched(tap.parts(), list(batches), num_steps, half, factors)
