"""What the events of a scheduled run tell: on the page, as a picture, in figures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dlora.events.activity import Activity, unit_labels
from dlora.show.drawing import heat_map
from dlora.show.report.write import write_report
from kit.run_page import CLOUD, Page, make_run

BERT = [[f"layer.{block}.{name}" for name in names] for block in (0, 11) for names in (
    ["attention.self.query", "attention.self.key", "attention.self.value"],
    ["attention.output.dense"], ["intermediate.dense"], ["output.dense"])]  # fmt: skip


def told(changes: list[tuple[int, list[int]]], costs: list[int], peer: str = "peer-0") -> list[Any]:
    """The events of one participant, its traffic reckoned step by step; FLOPs are traffic less 2
    for the lowest unit.
    """
    events, active = [], changes[0][1]
    spent = worked = done = 0
    for step, units in changes:
        spent, worked = (
            spent + (step - done) * sum(costs[unit] for unit in active),
            worked + (step - done) * flops(active, costs),
        )
        done, active = step, units
        so_far = (
            (spent / step / sum(costs), worked / step / flops([0], [sum(costs)]))
            if step
            else (1.0, 1.0)
        )
        fractions = {
            "adapter_fraction": so_far[0],
            "device_flops_fraction": so_far[1],
            "device_flops": flops(units, costs),
        }
        events.append({"event": "active", "peer": peer, "step": step, "units": units, **fractions})
    return events


def flops(units: list[int], costs: list[int]) -> int:
    return sum(costs[unit] for unit in units) - 2 if units else 0


def units_event(costs: list[int], names: list[list[str]] | None = None) -> Any:
    units = [
        {"modules": held, "cost": cost}
        for held, cost in zip(names or [["m"]] * len(costs), costs, strict=True)
    ]
    return {"event": "units", "units": units, "device_flops": sum(costs) - 2}


def heard(changes: list[tuple[int, list[int]]], costs: list[int]) -> Activity:
    activity = Activity()
    for event in [units_event(costs), *told(changes, costs)]:
        activity.hear(event)
    return activity


def test_units_are_called_after_their_block_and_the_endings_of_their_modules() -> None:
    endings = ["query, key, value", "attention.output.dense", "intermediate.dense", "output.dense"]
    assert unit_labels(BERT) == [f"{block} {ending}" for block in (0, 11) for ending in endings]
    assert unit_labels([["layers.3.mlp.gate_proj", "layers.3.mlp.up_proj"],
        ["layers.3.mlp.down_proj"], ["project_in"]]) == [
        "3 gate_proj, up_proj", "3 down_proj", "project_in"]  # fmt: skip
    assert unit_labels([["h.0.attn.c_attn"], ["h.0.attn.c_proj"], ["h.0.mlp.c_proj"]]) == [
        "0 c_attn", "0 attn.c_proj", "0 mlp.c_proj"]  # fmt: skip


def test_a_round_that_was_repeated_after_a_kill_counts_once() -> None:
    """A peer's log keeps what it told before it was killed; the round under way is told again."""
    activity, costs = heard([(0, [0]), (4, [1]), (6, [0])], [10, 10]), [10, 10]
    for event in told([(0, [0]), (4, [1]), (6, [0]), (9, [1])], costs)[1:]:
        activity.hear(event)
    assert [step for step, _ in activity.changes["peer-0"]] == [0, 4, 6, 9]
    assert activity.shares("peer-0", [0, 12]) == [[7 / 12], [5 / 12]]


def test_what_was_spent_is_known_between_changes_too() -> None:
    activity = heard([(0, [0]), (4, [0, 1])], [10, 30])
    assert activity.fractions("peer-0", 6) == pytest.approx(
        ((4 * 10 + 2 * 40) / (6 * 40), (4 * 8 + 2 * 38) / (6 * 38))
    )
    assert activity.fractions("peer-0", 4) == pytest.approx((10 / 40, 8 / 38))
    assert heard([(0, [1])], [10, 30]).fractions("peer-0", 0) == (0.75, 28 / 38)
    # a set that never changes is told of once
    assert heard([(0, [1])], [10, 30]).fractions("peer-0", 50) == (0.75, 28 / 38)


def test_columns_are_the_changes_until_there_are_too_many() -> None:
    activity = heard([(0, [0]), (4, [1]), (6, [])], [10, 30])
    edges = activity.columns("peer-0", 6)
    assert edges == [0, 4, 6] and activity.shares("peer-0", edges) == [[1, 0], [0, 1]]
    # unit 1 in each fourth step
    busy = heard([(step, [step % 4 // 3]) for step in range(2000)], [10, 30])
    edges = busy.columns("peer-0", 2000)
    shares = busy.shares("peer-0", edges)
    widths = [end - start for start, end in zip(edges, edges[1:], strict=False)]
    assert len(edges) == 301 and edges[-1] == 2000
    assert sum(
        share * width for share, width in zip(shares[1], widths, strict=True)
    ) == pytest.approx(500)
    assert all(sum(column) == pytest.approx(1) for column in zip(*shares, strict=True))


def test_a_map_is_as_coloured_as_its_values() -> None:
    picture = heat_map(
        [("one", [1.0, 1.0, 0.0]), ("two", [0.0, 0.0, 0.5])], [0, 2, 4, 10], "step", label="l"
    )
    shapes = re.findall(r'<path d="([^"]*)"[^>]*fill: var\(--c0\)(; opacity: 0.5)?', picture)
    lengths = {
        pale: max(xs := [float(x) for x in re.findall(r"[ML] ([\d.]+)", path)]) - min(xs)
        for path, pale in shapes
    }
    # one each, merged
    assert len(shapes) == 2 and lengths[""] / lengths["; opacity: 0.5"] == pytest.approx(
        4 / 6, rel=1e-3
    )
    assert (
        ">one</text>" in picture
        and "var(--faint)" in picture
        and "#" not in picture.replace('"#', "").replace("(#", "")
    )


def scheduled_page(folder: Path, *, running: bool = False, **what: Any) -> Page:
    """A page whose main run had a schedule: 4 of 8 units to begin with, one from step 10 on, of 30
    steps.
    """
    make_run(folder, stop_at=4 if running else None, **what)
    lines = (folder / "log.jsonl").read_text().splitlines()
    name = json.loads(lines[0])["runs"][0]
    events = [
        units_event([10] * 8, BERT),
        *told([(0, [0, 1, 2, 3]), (10, [7])], [10] * 8, json.loads(lines[0])["peers"][0]["name"]),
    ]
    lines[2:2] = [json.dumps({**event, "run": name}) for event in events]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    if not running:
        summary = json.loads((folder / "summary.json").read_text())
        summary["runs"][name] |= {"adapter_fraction": 0.25, "device_flops_fraction": 0.2}
        (folder / "summary.json").write_text(json.dumps(summary))
    return Page(write_report(folder))


def test_the_page_shows_who_was_active_and_what_was_saved(tmp_path: Path) -> None:
    page = scheduled_page(tmp_path, runs=("dec-lora", "local"), names=["solo"])
    assert "75.0 %" in page.text("b") and "80.0 %" in page.text("b")
    model = "saved by the schedule (by the cost model: no wire was used, all was computed here)"
    assert f"of the adapter's traffic {model}" in page.text("li")
    assert f"of the device's FLOPs for the adapter {model}" in page.text("li")
    said = page.text("figcaption")
    assert (
        "So far the schedule saved 75.0 % of the adapter's traffic and 80.0 % of what a device in a"
        " split computes for the adapter, both of those with all units active (by the cost model:"
        " no wire was used, all was computed here)." in said
    )
    assert (
        "Of 30 steps the unit that trained least was active in 0, the one that trained most in 20."
        in said
    )
    assert "0 query, key, value" in page.text("text") and "11 output.dense" in page.text("text")
    assert (
        "Which units trained" in page.text("h2")
        and "participants" not in said.split("Which units")[1]
    )


def test_of_several_the_first_is_shown_and_a_run_under_way_as_far_as_it_came(
    tmp_path: Path,
) -> None:
    page = scheduled_page(tmp_path, running=True, runs=("dec-lora",))
    assert "Which units trained when of peer-0, the first of 8 participants." in page.text(
        "figcaption"
    )
    # 4 of 6 rounds of 5 steps: half of all for 10, an eighth for 10
    assert "saved 68.8 % of the adapter's traffic and 70.5 % of" in page.text("figcaption")
    assert "68.8 %" in page.text("b") and "70.5 %" in page.text("b")


def test_where_there_was_a_wire_the_page_does_not_deny_it(tmp_path: Path) -> None:
    page = scheduled_page(tmp_path, runs=("dlora",), names=["phone"], split=CLOUD)
    assert "(by the cost model)" in page.text("figcaption") and "no wire" not in page.text()


def test_where_all_train_the_page_says_nothing_of_it(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path, runs=("dec-lora",), names=["solo"])))
    words = page.text("h2", "p", "li", "b", "figcaption", "text")
    assert "unit" not in words and "schedule" not in words
