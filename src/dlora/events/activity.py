"""Who was active when, from the events of a scheduled run."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from dlora.events.kinds import Active, Event

_MOST_COLUMNS = 300  # of a map: about as many as a picture has room for


class Activity:
    """What the events ``units`` and ``active`` of one run tell; empty for a run without a schedule.

    ``modules[u]``: dotted names of the modules of unit u. ``changes``: of each participant, by
    name, in the order in which they were first heard: the local step from which a set holds, and
    that set.
    """

    def __init__(self) -> None:
        self.modules: list[list[str]] = []
        self.costs: list[int] = []
        self.changes: dict[str, list[tuple[int, frozenset[int]]]] = {}
        self.device_flops = 0  # a token, with all units active
        self._told: dict[str, Active] = {}  # of each participant, its last event

    def hear(self, event: Event) -> None:
        """Take one event; others than these two change nothing."""
        if event["event"] == "units":  # a run that starts anew tells it again
            self.modules = [list(unit["modules"]) for unit in event["units"]]
            self.costs = [unit["cost"] for unit in event["units"]]
            self.device_flops, self.changes, self._told = event["device_flops"], {}, {}
        elif event["event"] == "active" and self.costs:
            changes = self.changes.setdefault(event["peer"], [])
            # told before a kill, and again when the round was repeated
            while changes and changes[-1][0] >= event["step"]:
                changes.pop()
            changes.append((event["step"], frozenset(event["units"])))
            self._told[event["peer"]] = event

    @property
    def first(self) -> str | None:
        """The participant heard of first; None without a schedule."""
        return next(iter(self.changes), None)

    @property
    def last_change(self) -> int:
        """The local step from which the first participant's newest set holds; 0 without a
        schedule.
        """
        return self.changes[self.first][-1][0] if self.first is not None else 0

    def fractions(self, peer: str, steps: int) -> tuple[float, float]:
        """Adapter traffic and device FLOPs of a participant's first ``steps`` local steps, of those
        with all units active.

        ``steps`` lies not before its last change; before any step, the fractions that its first
        will have.
        """
        last = self._told[peer]
        step, traffic = (
            last["step"],
            sum(self.costs[unit] for unit in last["units"]) / sum(self.costs),
        )

        def so_far(told: float, now: float) -> float:
            return (
                (told * step + now * (steps - step)) / steps
                if steps > step
                else told
                if step
                else now
            )

        flops = so_far(last["device_flops_fraction"], last["device_flops"] / self.device_flops)
        return so_far(last["adapter_fraction"], traffic), flops

    def columns(self, peer: str, steps: int) -> list[int]:
        """Local steps at which the columns of a participant's map begin, and ``steps``, where the
        last ends.

        The changes, or equal parts where there are very many of them; none lies behind ``steps``.
        """
        edges = sorted({0, steps, *(step for step, _ in self.changes[peer] if step < steps)})
        if len(edges) <= _MOST_COLUMNS + 1:
            return edges
        return sorted(
            {round(steps * number / _MOST_COLUMNS) for number in range(_MOST_COLUMNS + 1)}
        )

    def shares(self, peer: str, edges: Sequence[int]) -> list[list[float]]:
        """The fraction of local steps in which a unit was active, for each unit and each column
        between two ``edges``.

        ``edges`` as `columns` gives them.
        """
        counts = [[0] * (len(edges) - 1) for _ in self.costs]
        changes = self.changes[peer]
        ends = [step for step, _ in changes[1:]] + [edges[-1]]
        for (start, active), end in zip(changes, ends, strict=True):
            first, behind = max(0, bisect_left(edges, start + 1) - 1), bisect_left(edges, end)
            for column in range(first, behind):
                held = min(end, edges[column + 1]) - max(start, edges[column])
                for unit in active:
                    counts[unit][column] += max(0, held)
        widths = [end - start for start, end in zip(edges, edges[1:], strict=False)]
        return [[count / width for count, width in zip(row, widths, strict=True)] for row in counts]


def unit_labels(modules: Sequence[Sequence[str]]) -> list[str]:
    """A short name a unit: the number of its block and the endings of its modules' names: ``0
    query, key, value``.

    An ending is as long as it must be to be no other module's of a block.
    """
    split = [[_in_block(module) for module in held] for held in modules]
    paths = {path for held in split for _, path in held}
    labels = []
    for held in split:
        block = held[0][0]
        labels.append(f"{block} {', '.join(_ending(path, paths) for _, path in held)}".strip())
    return labels


def _in_block(module: str) -> tuple[str, str]:
    """The number of the block, empty where there is none, and the name inside it."""
    parts = module.split(".")
    at = next((index for index, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    return ("", module) if at is None else (parts[at], ".".join(parts[at + 1 :]))


def _ending(path: str, paths: set[str]) -> str:
    parts = path.split(".")
    endings = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
    return next(
        (
            one
            for one in endings
            if all(other == path or not f".{other}".endswith(f".{one}") for other in paths)
        ),
        path,
    )
