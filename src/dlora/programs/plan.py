"""What a run will cost, before it runs: bytes over each edge and in all, hours on a slow line, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from dlora.config import Config
from dlora.decentralized.ledger import round_message
from dlora.decentralized.mixing import build_rule
from dlora.decentralized.topology import Topology
from dlora.frames import MAX_CHUNK_BYTES, SIGNATURE_BYTES, Chunk, Decided, Frame, Have, Hello, Offer, Status, Want
from dlora.lora.factors import num_parameters, stack
from dlora.net.codec import encode_frame
from dlora.programs.messages import REDUCTION, message_bytes
from dlora.programs.plan_schedule import CHOSEN, sent_names
from dlora.programs.plan_split import LINES_MBIT_S, split_costs
from dlora.programs.prepare import Prepared, manifest_text, prepare

_HASH = "0" * 64
_SIGNATURE = bytes(SIGNATURE_BYTES)
_STATE_BYTES = 16  # of a trained number: value, gradient and AdamW's two moments


def plan(config: Config, own: str | None = None) -> dict[str, Any]:
    """The costs of ``config``: of real peers when it names members, else what their messages would be.

    ``own``: whose data are at hand (`dlora peer`, `dlora device`); None: everybody's (`dlora simulate`). Raises
    UserError as the run would.
    """
    prepared = prepare(config, own=own)
    topology = prepared.topology
    edges = edge_bytes(prepared)
    by_peer = Counter[str]()
    for (one, two), count in edges.items():
        by_peer[topology.names[one]] += count
        by_peer[topology.names[two]] += count
    rounds = config.train.rounds
    busiest = max(by_peer.values(), default=0)
    parameters = num_parameters(stack(prepared.trained, 1))
    return {
        "peers": topology.num_peers,
        "rounds": rounds,
        "trainable_parameters": parameters,
        "message_bytes": message_bytes(prepared, round_message(0)),
        "edges": {f"{topology.names[one]} - {topology.names[two]}": count for (one, two), count in sorted(edges.items())},
        "bytes_a_round": sum(edges.values()) / rounds,
        "bytes_on_wire": sum(edges.values()),
        "bytes_of_busiest_peer": busiest,
        "seconds_on_the_line": {f"{line} Mbit/s": busiest * 8 / (line * 1e6) for line in LINES_MBIT_S},
        **({"at_most": True} if config.schedule.kind in CHOSEN else {}),  # the bytes between peers
        "frozen_bytes": sum(weight.nbytes for weight in prepared.model.network.parameters()),
        "trained_bytes": _STATE_BYTES * parameters,
        **({} if prepared.half is None else {"cloud": split_costs(prepared, own)}),
    }


def edge_bytes(prepared: Prepared) -> dict[tuple[int, int], int]:
    """Serialised frames over each edge in a run in which nothing fails, both directions (law 8).

    Where a schedule goes by scores they are no count but a bound: what is sent is at most that.
    """
    topology, rounds = prepared.topology, prepared.config.train.rounds
    rule, count = build_rule(prepared.config.peers), Counter[tuple[int, int]]()
    hello = Hello(_HASH, manifest_text(prepared.manifest | {"rounds": rounds}), 0, _HASH)
    pairs = {edge for round in range(topology.period) for edge in topology.edges(round)}
    for edge in pairs:
        statuses = [Status(round) for round in (0, *range(rounds), rounds, rounds + 1)]  # one when the link comes up
        count[edge] += 2 * _bytes([hello, *statuses])
    names = sent_names(prepared, partial(message_bytes, prepared, round_message(0)))
    kinds: dict[frozenset[str], int] = {}  # messages that hold the same tensors cost the same
    for round in range(rounds):
        for edge in topology.edges(round):
            count[edge] += _bytes([Have(round, _SIGNATURE), Decided(round, True, _SIGNATURE)])
            for end in edge:
                sent = frozenset(name for name in names[end][round] if rule.sends(name, round))
                if sent not in kinds:
                    kinds[sent] = _bytes(transfer(round_message(round), message_bytes(prepared, round_message(round), sent)))
                count[edge] += kinds[sent]
    for edge in tree_edges(topology):
        for message in REDUCTION:
            count[edge] += _bytes(transfer(message, message_bytes(prepared, message)))
    return dict(count)


def transfer(message: str, num_bytes: int) -> Iterator[Frame]:
    """The frames that carry one message, and that ask for it."""
    yield Offer(message, num_bytes, _HASH)
    yield Want(message, 0)
    for offset in range(0, num_bytes, MAX_CHUNK_BYTES):
        yield Chunk(message, offset, bytes(min(MAX_CHUNK_BYTES, num_bytes - offset)))


def tree_edges(topology: Topology) -> list[tuple[int, int]]:
    """The edges of the final reduction."""
    parents = {peer: topology.tree(peer)[0] for peer in range(topology.num_peers)}
    return [(min(peer, parent), max(peer, parent)) for peer, parent in parents.items() if parent is not None]


def _bytes(frames: Iterable[Frame]) -> int:
    return sum(len(encode_frame(frame)) for frame in frames)
