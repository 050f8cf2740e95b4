"""Finds a participant's part of the optimisers' state, in whatever groups it trained."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Moments:
    """The optimisers' state as `Participants.optimizer_state` names it, by participants.

    ``numbers`` are its tensors: moments with a row for each participant of a group, and the number
    of steps of the group, which all its participants have taken.
    """

    def __init__(self, numbers: Mapping[str, Tensor]) -> None:
        found: dict[tuple[str, int], dict[str, Tensor]] = {}
        for path, value in numbers.items():
            group_first, leaf, key = path.split("/")
            found.setdefault(leaf_rows(leaf, int(group_first)), {})[key] = value
        self._parts: dict[str, list[tuple[range, dict[str, Tensor]]]] = {}
        for (name, first), state in sorted(found.items()):
            count = max((len(value) for value in state.values() if value.dim()), default=0)
            self._parts.setdefault(name, []).append((range(first, first + count), state))

    def of(self, name: str, wanted: range) -> dict[str, Tensor]:
        """Copies for the participants ``wanted``; empty if none of them has taken a step.

        A participant that has taken none gets zeros, which is what the optimiser begins with.
        """
        parts = [
            (rows, state)
            for rows, state in self._parts.get(name, ())
            if rows.start < wanted.stop and wanted.start < rows.stop
        ]
        if not parts:
            return {}
        found: dict[str, Tensor] = {}
        for key, like in parts[0][1].items():
            if not like.dim():
                found[key] = like.clone()
                continue
            found[key] = like.new_zeros(len(wanted), *like.shape[1:])
            for rows, state in parts:
                start, stop = max(rows.start, wanted.start), min(rows.stop, wanted.stop)
                found[key][start - wanted.start : stop - wanted.start] = state[key][
                    start - rows.start : stop - rows.start
                ]
        return found


def leaf_rows(leaf: str, group_first: int) -> tuple[str, int]:
    """The tensor and the first participant of an optimiser's leaf: with a schedule, each
    participant of a group has a leaf of its own, ``NAME@PLACE``.
    """
    name, _, place = leaf.partition("@")
    return name, group_first + int(place or 0)
