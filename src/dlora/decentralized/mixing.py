"""What "average" means for LoRA: the rules, one per published method.

Every rule mixes A and B apart (never their product) and in difference form,

    x_i += sum_j w_ij (sent_j - sent_i)

The sum is over the neighbours j whose exchange with i was committed. A missing neighbour adds
nothing. Because w is symmetric, the mean over all peers is kept.

Under a schedule, peers may have different units active. Each edge then mixes the tensors that both
its ends sent, as if the edge were missing for all other tensors. Every matrix here is symmetric
(`Topology` refuses others), so the mean of each tensor over all peers is still kept exactly. Peers
that have a tensor active agree about it among themselves, edge by edge. A peer that has it killed
keeps its value until it and one of its neighbours both have the tensor active. Agreement is
therefore slower, and there is none about a unit that no two neighbours ever have active together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dlora.config.peers import PeersSection
from dlora.decentralized.matrices import Matrix
from dlora.lora.factors import Factors

# numbers of all peers that are mixed at once; with two copies they stay in a core's cache (measured
# on 1,000 peers: 2.7 times a plain add_, 6 times if all are mixed at once)
BLOCK = 1 << 18

# for each tensor: whose messages came from other processes, and these messages, (M, ...); nobody's
# and (1, ...) where all exchange with all: the mean of all messages, with those sent here
Received = Mapping[str, tuple[Sequence[int], Tensor]]


class Rule(Protocol):
    """Which factors train in a round and which are sent and mixed after it."""

    def trains(self, name: str, round: int) -> bool:
        """Whether the tensor ``name`` takes local steps in ``round``."""

    def sends(self, name: str, round: int) -> bool:
        """Whether the tensor ``name`` is exchanged and mixed at the end of ``round``."""


class Factor:
    """Dec-LoRA (arXiv 2501.15361): A and B train together and are averaged apart."""

    def trains(self, name: str, round: int) -> bool:
        """True for every tensor."""
        return True

    def sends(self, name: str, round: int) -> bool:
        """True for every tensor."""
        return True


class Ffa:
    """FFA-LoRA (arXiv 2403.12313): A is the same for all peers and never trains. Averaging B is
    then exact, and a message has about half the bytes.
    """

    def trains(self, name: str, round: int) -> bool:
        """True for every tensor but A."""
        return not name.endswith(".lora_A")

    def sends(self, name: str, round: int) -> bool:
        """True for every tensor but A."""
        return self.trains(name, round)


@dataclass(frozen=True)
class Alternate:
    """ADF-LoRA (arXiv 2511.18291): B trains for ``period`` rounds, then A for as many, and so on.

    Both are mixed in every round. B goes first: while B is zero, A's gradient is zero.
    """

    period: int

    def trains(self, name: str, round: int) -> bool:
        """True for the factor whose turn it is, and always for the head."""
        resting = ".lora_A" if (round // self.period) % 2 == 0 else ".lora_B"
        return not name.endswith(resting)

    def sends(self, name: str, round: int) -> bool:
        """True for both factors: without mixing, the factor that does not train would stay
        different from peer to peer.
        """
        return True


def build_rule(section: PeersSection) -> Rule:
    """The rule that the config names."""
    rules: dict[str, Rule] = {
        "factor": Factor(),
        "ffa": Ffa(),
        "alternate": Alternate(section.period),
    }
    return rules[section.rule]


@torch.no_grad()
def mix(
    factors: Factors,
    sent: Mapping[str, Tensor],
    mixing: Matrix,
    committed: Iterable[tuple[int, int]],
    names: Sequence[Collection[str]] | None = None,
    here: range | None = None,
    received: Received | None = None,
    wire: torch.dtype | None = None,
) -> None:
    """x_i += sum_j w_ij (sent_j - sent_i), for all peers i at once and in place, over the
    ``committed`` edges (i < j).

    ``factors`` and ``sent`` are (P, ...) each, and may be the same tensors. ``mixing`` is the
    round's (P, P) matrix, sparse, row = receiver. ``names``: for each peer, the tensors that it
    sent; None: all. An edge mixes a tensor that both its ends sent. For each tensor the matrix is
    then still symmetric with rows that sum to one. ``here``: the peers whose rows ``factors`` and
    ``sent`` are; None: all. ``received``: what their neighbours in other processes sent. ``wire``:
    the dtype in which messages travel; a difference uses the values as they were on the wire, for
    the peer itself too.

    It costs what the edges cost. A block of columns that the cache holds is read once, and its
    change is added in place.
    """
    num_peers = mixing.shape[0]
    edges, here = list(committed), range(num_peers) if here is None else here
    share, whole = _share_of_all(mixing, edges), len(here) == num_peers
    if not whole:
        edges = [(i, j) for i, j in edges if i in here or j in here]
    all_edges = tuple(edges)
    # tensors over the same edges share one
    changes: dict[object, Callable[[Tensor, Tensor, Tensor], object]] = {}
    for name, message in sent.items():
        both_sent = all_edges
        if names is not None:
            both_sent = tuple((i, j) for i, j in edges if name in names[i] and name in names[j])
        if not both_sent:
            continue
        others, came = (received or {}).get(name, ((), message[:0]))
        into_PN, sent_PN = factors[name].view(len(here), -1), message.reshape(len(here), -1)
        came_MN = came.reshape(len(came), sent_PN.shape[1])
        key = (both_sent, tuple(others))
        if key not in changes:
            changes[key] = (
                partial(_add_mean, share)
                if share is not None and len(both_sent) == len(edges) and (names is None or whole)
                else _change(mixing, both_sent, here, others, message)
            )
        width, change = max(64, BLOCK // len(here)), changes[key]
        for start in range(0, sent_PN.shape[1], width):
            into, x, y = (
                tensor[:, start : start + width] for tensor in (into_PN, sent_PN, came_MN)
            )
            x = x if wire is None else x.to(wire).to(x.dtype)
            # Rows sum to zero, so subtracting one peer's value from all changes nothing in exact
            # arithmetic. It keeps the multiplied numbers small: the rounding error is small
            # relative to the change and not only to the value, and it is zero if all peers are the
            # same.
            change(into, x - x[0], y - x[0] if len(y) else y)


def _share_of_all(mixing: Matrix, edges: Sequence[tuple[int, int]]) -> float | None:
    """How much of the mean a peer takes where all exchange with all, at one weight; else None."""
    num_peers = mixing.shape[0]
    if not edges or len(edges) < num_peers * (num_peers - 1) // 2:
        return None
    weights = mixing[*np.array(edges).T]
    return num_peers * float(weights[0]) if (weights == weights[0]).all() else None


def _add_mean(share: float, into: Tensor, x: Tensor, y: Tensor) -> None:
    """``y``: the mean of all, if some are in other processes; else empty."""
    into.add_((y[0] if len(y) else x.mean(dim=0)) - x, alpha=share)


def _change(
    mixing: Matrix,
    edges: Sequence[tuple[int, int]],
    here: range,
    others: Sequence[int],
    like: Tensor,
) -> Callable[[Tensor, Tensor, Tensor], object]:
    """A function of (into, x, y) that adds sum_j w_ij (x_j - x_i) over ``edges`` to each row i of
    ``into``. ``into`` and ``x`` have a row for each peer ``here``, and ``y`` for each of
    ``others``.
    """
    ends = np.array(edges)
    # over each edge in both directions: who receives, who sends, at which weight
    i, j, weights = ends.ravel(), ends[:, ::-1].ravel(), np.repeat(mixing[*ends.T], 2)
    i_here, j_here = ((here.start <= peer) & (peer < here.stop) for peer in (i, j))
    rows, columns, outside = i - here.start, j - here.start, i_here & ~j_here
    # -w on the diagonal and w beside it
    to_x = np.column_stack([i_here, i_here & j_here])
    from_x = _matrix(
        np.column_stack([rows, rows])[to_x],
        np.column_stack([rows, columns])[to_x],
        np.column_stack([-weights, weights])[to_x],
        (len(here), len(here)),
        like,
    )
    if not outside.any():
        return lambda into, x, y: torch.addmm(into, from_x, x, out=into)
    place = {peer: number for number, peer in enumerate(others)}
    places = np.array([place[peer] for peer in j[outside].tolist()])
    from_y = _matrix(rows[outside], places, weights[outside], (len(here), len(others)), like)

    def change(into: Tensor, x: Tensor, y: Tensor) -> None:
        torch.addmm(into, from_x, x, out=into)
        torch.addmm(into, from_y, y, out=into)

    return change


def _matrix(
    rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int], like: Tensor
) -> Tensor:
    """A matrix of the ``values``, which add up where they meet, in the form that multiplies fastest
    where ``like`` is.
    """
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([rows, columns])),
        torch.from_numpy(values),
        shape,
        check_invariants=True,
    ).coalesce()
    matrix = matrix.to(like.device, like.dtype)
    if 4 * matrix._nnz() > matrix.numel():  # more than a quarter of all pairs
        return matrix.to_dense()
    if like.device.type != "cpu" or torch.backends.mkl.is_available():
        with warnings.catch_warnings():  # three times as fast, and torch calls this form beta
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            return matrix.to_sparse_csr()
    return matrix


@torch.no_grad()
def mix_edge(
    factors: Factors, weight: float, sent: Mapping[str, Tensor], received: Mapping[str, Tensor]
) -> dict[str, float]:
    """Mix one peer's ``factors``, (1, ...) each, over one committed edge, in place.

    ``weight``: the neighbour weight. A tensor that only one end sent is not mixed. Returns for each
    mixed tensor the norm of the difference between the two ends.
    """
    apart = {}
    for name in sent.keys() & received.keys():
        difference = received[name] - sent[name]
        apart[name] = difference.norm().item()
        factors[name].add_(difference.to(factors[name].device), alpha=weight)
    return apart
