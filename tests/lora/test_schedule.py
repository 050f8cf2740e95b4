"""The schedule of Kill and Revive by itself: budget, no starvation, same again."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlora.config.run import ScheduleSection
from dlora.lora.kill_revive import Schedule

COSTS = st.lists(st.integers(1, 40), min_size=1, max_size=10)
SECTIONS = st.builds(
    ScheduleSection,
    kind=st.sampled_from(["all", "random", "probe", "kr"]),
    active_fraction=st.floats(0.05, 1.0),
    period=st.integers(1, 12),
    warmup_steps=st.integers(1, 12),
)


def drive(schedule: Schedule, steps: int, seed: int) -> list[frozenset[int]]:
    """``steps`` local steps with scores of chance (a function of seed and step); the active set of
    each.
    """
    sets = []
    for step in range(schedule.steps_done, schedule.steps_done + steps):
        sets.append(schedule.active)
        chance = random.Random(f"{seed}/{step}")
        scores = [chance.choice([0.0, 1.0, chance.expovariate(1)]) for _ in schedule.units]
        schedule.observe({unit: scores[unit] for unit in schedule.active})
    return sets


@given(SECTIONS, COSTS, st.integers(0, 9))
def test_the_active_set_never_costs_more_than_its_fraction(
    section: ScheduleSection, costs: list[int], seed: int
) -> None:
    schedule = Schedule(section, costs, len, seed)
    sets = drive(schedule, 80, seed)
    budget = max(section.active_fraction * sum(costs), max(costs))
    probed = section.warmup_steps if section.kind == "probe" else 0
    for active in sets[probed:] if section.kind != "all" else []:
        assert active and sum(costs[unit] for unit in active) <= budget
    for active in sets[:probed]:
        assert active == frozenset(range(len(costs)))
    assert schedule.meter.numbers == sum(costs[unit] for active in sets for unit in active)
    assert schedule.epoch == sum(
        one != other for one, other in zip(sets, [*sets[1:], schedule.active], strict=True)
    )


@given(SECTIONS.filter(lambda section: section.kind == "kr"), COSTS, st.integers(0, 9))
def test_no_unit_starves_and_each_trains_early(
    section: ScheduleSection, costs: list[int], seed: int
) -> None:
    schedule = Schedule(section, costs, len, seed)
    sets = drive(schedule, schedule.warmup_steps + 2 * schedule.longest_rest, seed)
    assert frozenset().union(*sets[: schedule.warmup_steps]) == frozenset(range(len(costs)))
    assert schedule.warmup_steps < section.warmup_steps + len(costs)
    for unit in range(len(costs)):
        rested = 0
        for active in sets:
            rested = 0 if unit in active else rested + 1
            assert rested <= schedule.longest_rest


@given(SECTIONS, COSTS, st.integers(0, 9), st.integers(0, 60))
def test_same_seed_and_scores_same_sets_and_resuming_is_exact(
    section: ScheduleSection, costs: list[int], seed: int, stopped_after: int
) -> None:
    whole = drive(Schedule(section, costs, len, seed), 80, seed)
    first = Schedule(section, costs, len, seed)
    sets = drive(first, stopped_after, seed)
    second = Schedule(section, costs, len, seed)
    second.load(json.loads(json.dumps(first.state())))
    assert sets + drive(second, 80 - stopped_after, seed) == whole


def test_kr_revives_the_longest_idle_on_trial_and_keeps_it_if_it_is_worth_more() -> None:
    """Twelve equal units, two active; those from 7 on have gradients ten times as large; 5 is worth
    more from step 40 on.
    """
    section = ScheduleSection(kind="kr", active_fraction=0.17, period=10, warmup_steps=6)
    schedule = Schedule(section, [10] * 12, len, seed=0)
    sets = []
    for step in range(6 + 11 * 10):
        sets.append(schedule.active)
        worth = [1.0] * 7 + [10.0] * 5
        worth[2], worth[9] = 2.0, 30.0
        worth[5] = 90.0 if step >= 40 else 1.0
        schedule.observe({unit: worth[unit] for unit in schedule.active})
    assert sorted(unit for active in sets[:6] for unit in active) == [*range(12)]  # the rotation
    # 2 is worth more than its neighbours, if less than 7 to 11
    assert {*sets[6:16]} == {frozenset({2, 9})}
    idle = [unit for active in sets[:6] for unit in sorted(active) if unit not in (2, 9)]
    before = idle.index(5)
    assert before >= 3  # so that its trial is behind the 40th step
    for turn, revived in enumerate(idle[: before + 1]):
        start = 16 + 10 * turn
        # instead of 2, the lower one
        assert {*sets[start : start + 2]} == {frozenset({9, revived})}
        assert {*sets[start + 2 : start + 10]} == {frozenset({9, 5} if revived == 5 else {9, 2})}


@pytest.mark.parametrize("kind", ["kr", "random"])
def test_an_eighth_saves_seven_eighths_warm_up_included(kind: str) -> None:
    """MiniLM's 24 units: 6 blocks of query, key, value; output; up; down. The rotation through all
    takes eight turns.
    """
    widths = [(384, 3 * 384), (384, 384), (384, 1536), (1536, 384)]
    costs = [2 * (in_features + out) for _ in range(6) for in_features, out in widths]
    schedule = Schedule(ScheduleSection(kind=kind), costs, len, 0)
    drive(schedule, 1000, 0)
    assert schedule.warmup_steps == (80 if kind == "kr" else 0)
    assert 0.11 < schedule.meter.fraction <= 0.125


@given(SECTIONS, COSTS, st.integers(0, 9), st.integers(0, 40), st.integers(0, 40))
def test_steps_that_were_skipped_leave_draws_common_and_scores_as_they_were(
    section: ScheduleSection, costs: list[int], seed: int, taken: int, skipped: int
) -> None:
    there, late = Schedule(section, costs, len, seed), Schedule(section, costs, len, seed)
    drive(there, taken + skipped, seed)
    drive(late, taken, seed)
    utility = list(late.utility)
    late.skip(skipped)
    assert late.utility == utility and late.steps_done == there.steps_done
    if section.kind in ("all", "random") or there.steps_done < there.warmup_steps:
        assert late.active == there.active
    drive(late, 40, seed)
    assert late.active


def test_a_seed_of_its_own_is_a_draw_of_its_own() -> None:
    section = ScheduleSection(kind="random", period=1, active_fraction=0.3)
    one, other = (drive(Schedule(section, [1] * 10, len, seed), 20, 0) for seed in (1, 2))
    assert one != other
    assert len({*one}) > 10  # drawn anew in every period
