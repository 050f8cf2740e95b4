"""What a run will cost, before it runs: bytes over each edge and in all, time on slow lines,
memory, seconds a round.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from dlora.config.run import Config
from dlora.costs.between_peers import counted_bytes, edge_bytes
from dlora.costs.scheduled import CHOSEN
from dlora.costs.sizing import sizing
from dlora.costs.with_cloud import LINES_MBIT_S, split_costs
from dlora.decentralized.peer.messages_on_disk import round_message
from dlora.lora.factors import num_parameters, stack
from dlora.run.grouping import STATE_BYTES
from dlora.run.prepare import prepare


def plan(config: Config, own: str | None = None) -> dict[str, Any]:
    """The costs of ``config`` for real peers and, where the data of all are here, what a simulation
    of them would count.

    ``own``: the only participant whose data are here (`dlora peer`, `dlora device`); None: the data
    of all are here (`dlora simulate`). Where the frozen model is here too, some local steps are
    taken, to measure them. Raises UserError as the run would.
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
        "message_bytes": prepared.messages.num_bytes(round_message(0)),
        "edges": {
            f"{topology.names[one]} - {topology.names[two]}": count
            for (one, two), count in sorted(edges.items())
        },
        "bytes_a_round": sum(edges.values()) / rounds,
        "bytes_on_wire": sum(edges.values()),
        **({"bytes_simulated": counted_bytes(prepared)} if own is None else {}),
        "bytes_of_busiest_peer": busiest,
        "seconds_on_the_line": {
            f"{line} Mbit/s": busiest * 8 / (line * 1e6) for line in LINES_MBIT_S
        },
        # the bytes between peers are upper bounds
        **({"at_most": True} if config.schedule.kind in CHOSEN else {}),
        "frozen_bytes": sum(weight.nbytes for weight in prepared.model.network.parameters()),
        "trained_bytes": STATE_BYTES * parameters,
        **(
            {"sizing": sizing(prepared, others=own is None)}
            if prepared.half is None
            else {"cloud": split_costs(prepared, own)}
        ),
    }
