"""What a peer reports about its neighbours at its end: what was wrong, and which rounds
were mixed.
"""

from __future__ import annotations

from collections.abc import Callable

from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.topology import Topology
from dlora.events.neighbours import NeighbourEvent


class Findings:
    """Receives the exchange's reports and passes them on to ``emit``.

    It keeps the first report of each kind about each neighbour. ``again``: how a user starts peers
    again.
    """

    def __init__(
        self,
        name: str,
        num_peers: int,
        emit: Callable[[NeighbourEvent], object],
        again: str = "with --resume",
    ) -> None:
        self.name, self.num_peers, self.emit, self.again = name, num_peers, emit, again
        self._found: dict[tuple[str, str], str] = {}

    def __call__(self, event: NeighbourEvent) -> None:
        """Take one event of the exchange."""
        self.emit(event)
        match event["event"]:
            case "not-followed" | "left-out" | "other-content" | "two-folders":
                self._keep(event["event"], event["neighbour"], event["reason"])
            # if it was shown its own signature, the neighbour restores the edge or stops with its
            # own message
            case "lacks" if not event["shown"]:
                self._keep("lacks", event["neighbour"], event["reason"])
            case "implausible":  # and so not taken
                text = f"its {event['message']} was refused: {event['reason']}"
                self._keep("implausible", event["neighbour"], text)
            case "doubtful":
                text = f"its {event['message']}: {event['reason']}"
                self._keep(f"doubtful-{event['message']}", event["neighbour"], text)
            case "unlinked" if event["reason"].startswith("refused: "):
                self._keep("refused", event["neighbour"], event["reason"])
            case "caught-up":  # they really were ahead
                for neighbour in event["neighbours"]:
                    self._found.pop(("not-followed", neighbour), None)
                ahead = ", ".join(event["neighbours"])
                place = f"from round {event['was']} to {event['round']}"
                text = f"it was far behind, and took the state of {ahead} to go {place}"
                self._keep("caught-up", self.name, text)

    def _keep(self, kind: str, neighbour: str, text: str) -> None:
        self._found.setdefault((kind, neighbour), text)

    def warnings(self, num_averaged: int) -> list[str]:
        """What the summary and the terminal say at the end, one line each."""
        found = [f"{neighbour}: {text}" for (_, neighbour), text in sorted(self._found.items())]
        if num_averaged < self.num_peers:
            found.append(
                f"the average is of {num_averaged} of {self.num_peers} peers; once the others are"
                f" back, start all of them again {self.again}"
            )
        return found

    def blamed(self, num_averaged: int) -> str | None:
        """One line that says why the average may be wrong; None if no report says so.

        If peers are missing from the average, honest neighbours may have another average, so only a
        doubtful average counts then.
        """
        kinds = (
            ("other-content", "doubtful-average")
            if num_averaged == self.num_peers
            else ("doubtful-average",)
        )
        for (kind, neighbour), text in sorted(self._found.items()):
            if kind in kinds:
                return (
                    f"the average of {self.name} may be wrong: {neighbour}: {text}; everything is"
                    f" written, score the average and {self.name}'s own adapter before you use one,"
                    f" and ask {neighbour}"
                )
        return None


def edge_counts(
    name: str, topology: Topology, ledger: Ledger, rounds: int
) -> dict[str, dict[str, int]]:
    """For each neighbour, how many of the run's rounds with it were mixed, left out, or are in
    doubt.
    """
    index, committed = topology.names.index(name), ledger.committed()
    counts = {}
    for other in topology.all_neighbours(index):
        neighbour = topology.names[other]
        due = [round for round in range(rounds) if other in topology.neighbours(index, round)]
        mixed = sum((round, neighbour) in committed for round in due)
        doubts = len(ledger.in_doubt(neighbour))
        counts[neighbour] = {
            "mixed": mixed,
            "left_out": len(due) - mixed - doubts,
            "in_doubt": doubts,
        }
    return counts
