"""What a run sends over the edges between peers, before it runs: frames and their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, partial

from dlora.costs.scheduled import sent_names
from dlora.decentralized.mixing import build_rule
from dlora.decentralized.peer.messages import REDUCTION
from dlora.decentralized.peer.messages_on_disk import round_message
from dlora.decentralized.topology import Topology
from dlora.run.manifest import manifest_text
from dlora.run.prepare import Prepared
from dlora.wire.peer.codec import encode_frame
from dlora.wire.peer.frames import (
    MAX_CHUNK_BYTES,
    SIGNATURE_BYTES,
    Chunk,
    Decided,
    Frame,
    Have,
    Hello,
    Offer,
    Status,
    Want,
)

_HASH = "0" * 64
_SIGNATURE = bytes(SIGNATURE_BYTES)


def edge_bytes(prepared: Prepared) -> dict[tuple[int, int], int]:
    """The serialised frames over each edge in a run in which nothing fails, both directions
    together (law 8). Where a schedule chooses by scores, the figure is an upper bound and no count.
    """
    topology, rounds = prepared.topology, prepared.config.train.rounds
    messages = prepared.messages
    rule, count = build_rule(prepared.config.peers), Counter[tuple[int, int]]()
    hello = Hello(_HASH, manifest_text(prepared.manifest | {"rounds": rounds}), 0, _HASH)
    pairs = {edge for round in range(topology.period) for edge in topology.edges(round)}
    for edge in pairs:
        # one when the link comes up
        statuses = [Status(round) for round in (0, *range(rounds), rounds, rounds + 1)]
        count[edge] += 2 * _bytes([hello, *statuses])
    names = sent_names(prepared, partial(messages.num_bytes, round_message(0)))
    kinds: dict[frozenset[str], int] = {}  # messages that hold the same tensors cost the same
    for round in range(rounds):
        for edge in topology.edges_among(prepared.drawn(round), round):
            count[edge] += _bytes([Have(round, _SIGNATURE), Decided(round, True, _SIGNATURE)])
            for end in edge:
                sent = frozenset(name for name in names[end][round] if rule.sends(name, round))
                if sent not in kinds:
                    kinds[sent] = _bytes(
                        transfer(
                            round_message(round),
                            messages.num_bytes(round_message(round), sent),
                        )
                    )
                count[edge] += kinds[sent]
    for edge in tree_edges(topology):
        for message in REDUCTION:
            count[edge] += _bytes(transfer(message, messages.num_bytes(message)))
    return dict(count)


def counted_bytes(prepared: Prepared) -> int:
    """What a simulation counts (law 8): the messages of all rounds, both directions together.

    A simulation has no links, so no other frames, and computes the average at the end without
    messages. Where a schedule chooses by scores, the figure is an upper bound.
    """
    topology, messages = prepared.topology, prepared.messages
    names = sent_names(prepared, partial(messages.num_bytes, round_message(0)))
    num_bytes = cache(lambda round, held: messages.num_bytes(round_message(round), held))
    total = 0
    for round in range(prepared.config.train.rounds):
        edges = topology.edges_among(prepared.drawn(round), round)
        if len({of_peer[round] for of_peer in names}) == 1:
            total += 2 * len(edges) * num_bytes(round, names[0][round])
        else:
            total += sum(num_bytes(round, names[end][round]) for edge in edges for end in edge)
    return total


def transfer(message: str, num_bytes: int) -> Iterator[Frame]:
    """The frames that carry one message, and the frame that asks for it."""
    yield Offer(message, num_bytes, _HASH)
    yield Want(message, 0)
    for offset in range(0, num_bytes, MAX_CHUNK_BYTES):
        yield Chunk(message, offset, bytes(min(MAX_CHUNK_BYTES, num_bytes - offset)))


def tree_edges(topology: Topology) -> list[tuple[int, int]]:
    """The edges of the final reduction."""
    return [
        (min(peer, parent), max(peer, parent))
        for peer, parent in enumerate(topology.parents)
        if parent is not None
    ]


def _bytes(frames: Iterable[Frame]) -> int:
    return sum(len(encode_frame(frame)) for frame in frames)
