"""What a schedule lets each peer send in a round, before it runs: the tensors, or the most that
they can be.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from dlora.lora.active import schedule_units
from dlora.lora.kill_revive import Schedule
from dlora.run.prepare import Prepared

CHOSEN = ("kr", "probe")  # by scores, which nobody knows before the run


def sent_names(
    prepared: Prepared, num_bytes: Callable[[Collection[str]], int]
) -> list[list[frozenset[str]]]:
    """The names of the tensors in the message of each peer and round; ``num_bytes`` gives a
    message's length by these names.

    It is exact where units are named or drawn. Where scores choose, the sets are unknown: then it
    is the longest message that the schedule allows. A peer whose data are elsewhere is taken to
    make as many local steps as the one that is here.
    """
    config, count = prepared.config, prepared.topology.num_peers
    own_steps = (
        prepared.local_steps
        if len(prepared.local_steps) == count
        else prepared.local_steps[:1] * count
    )
    everything = frozenset(prepared.trained)
    if config.schedule.kind == "all":
        return [[everything] * config.train.rounds] * count
    tensors = [
        {name for name in everything if name.rpartition(".")[0] in unit.modules}
        for unit in prepared.units
    ]  # of each unit
    outside = everything.difference(*tensors)
    bare = num_bytes(outside)
    weight = [num_bytes(outside | names) - bare for names in tensors]
    rounds: dict[int, list[frozenset[str]]] = {}
    for steps in set(own_steps):
        [schedule] = schedule_units(
            config.schedule, prepared.units, config.adapter_section, config.seed, ["any"]
        ).schedules
        units = [_of_round(schedule, steps, weight) for _ in range(config.train.rounds)]
        rounds[steps] = [outside.union(*(tensors[unit] for unit in chosen)) for chosen in units]
    return [rounds[steps] for steps in own_steps]


def _of_round(schedule: Schedule, steps: int, weight: list[int]) -> frozenset[int]:
    """The units that take part in the next ``steps`` local steps. ``weight`` says what each adds to
    a message, in bytes.
    """
    known, unknown = frozenset[int](), 0
    chosen = schedule.section.kind in CHOSEN
    for _ in range(steps):
        since = schedule.steps_done - schedule.warmup_steps
        if not chosen or since < 0:
            known |= schedule.active
        elif unknown == 0 or since == 0 or schedule.may_choose(since):
            unknown += 1  # another set, of any units that the budget holds
        schedule.skip(1)
    return known | _heaviest(schedule, unknown * schedule.budget, weight)


def _heaviest(schedule: Schedule, budget: float, weight: list[int]) -> frozenset[int]:
    """Units that weigh at least as much as any set that costs at most ``budget``: those with the
    most weight for their cost, and a part of the last one.
    """
    taken, cost = [], 0
    for unit in sorted(schedule.units, key=lambda unit: -weight[unit] / schedule.costs[unit]):
        if cost >= budget:
            break
        taken.append(unit)
        cost += schedule.costs[unit]
    return frozenset(taken)
