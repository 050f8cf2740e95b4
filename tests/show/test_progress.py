"""Events become bars on a terminal and nothing elsewhere."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from dlora.show.progress import STARTING, Progress

STORY: list[Any] = [
    {"event": "phase", "text": "loading model"},
    {"event": "start", "metric": "accuracy", "runs": ["dec-lora", "local"]},
    {"event": "run", "run": "dec-lora", "rounds": 2, "local_steps": [5, 5], "participants": 2},
    {"event": "step", "run": "dec-lora", "done": 5, "total": 10},
    {"event": "round", "run": "dec-lora", "round": 0, "loss": 0.6934, "bytes_on_wire": 1_400_000},
    {"event": "evaluating", "run": "dec-lora", "what": "[b]peer", "done": 1, "total": 3},
    {
        "event": "scores",
        "run": "dec-lora",
        "rounds_done": 1,
        "consensus": {"accuracy": 0.8434},
        "peers_mean": None,
    },
]
END: list[Any] = [
    {"event": "run-done", "run": "dec-lora"},
    {"event": "resumed", "run": "local", "rounds_done": 3},
    {"event": "step", "run": "local", "done": 20, "total": 100},
    {
        "event": "scores",
        "run": "local",
        "rounds_done": 4,
        "consensus": {"accuracy": 0.9},
        "peers_mean": {"accuracy": 0.25},
    },
    {"event": "saved"},
    {"event": "done", "seconds": 3.0},
]


def drawn(progress: Progress, width: int = 160) -> str:
    """What the terminal shows now."""
    file = io.StringIO()
    Console(file=file, width=width).print(progress._bars.get_renderable())
    return file.getvalue().replace("\u00a0", " ")


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=160)


def test_a_run_in_the_middle() -> None:
    with Progress(terminal()) as progress:
        progress(STORY[0])
        assert "loading model" in drawn(progress)
        for event in STORY[1:6]:
            progress(event)
        assert "scoring [b]peer" in drawn(progress)  # a peer's name is no markup
        progress(STORY[6])
        shown = drawn(progress)
    assert "loading" not in shown and "scoring" not in shown
    for part in ("Dec-LoRA", "1/2 rounds", "loss 0.693", "accuracy 84.3 %", "1.4 MB"):
        assert part in shown


def test_a_resumed_run_starts_in_the_middle_and_alone_shows_the_peers_mean() -> None:
    with Progress(terminal()) as progress:
        for event in STORY + END:
            progress(event)
        shown = drawn(progress)
    alone = next(line for line in shown.splitlines() if "Alone" in line)
    assert "3 rounds" in alone and "accuracy 25.0 %" in alone and "✓" not in alone
    assert "✓" in next(line for line in shown.splitlines() if "Dec-LoRA" in line)


def test_a_real_peer_shows_who_is_here() -> None:
    with Progress(terminal()) as progress:
        for event in STORY:
            progress(event)
        progress({"event": "linked", "neighbour": "west", "round": 0})
        progress({"event": "linked", "neighbour": "north", "round": 0})
        assert "1.4 MB, north here, west here" in drawn(progress)
        progress({"event": "unlinked", "neighbour": "west", "reason": "the link broke"})
        assert "north here, west away" in drawn(progress)
        progress({"event": "unlinked", "neighbour": "north", "reason": "it has finished"})
        assert "north finished, west away" in drawn(progress)


def test_a_log_file_says_at_its_end_that_the_run_has_ended() -> None:
    """A peer that had finished before and is resumed has no other line after its last phase."""
    file = io.StringIO()
    with Progress(Console(file=file)) as progress:
        progress(STORY[2])
        progress({"event": "phase", "text": "waiting for the neighbours"})
    assert file.getvalue().endswith(" finished\n")
    with pytest.raises(KeyError), Progress(Console(file=file)) as progress:
        progress(STORY[2])
        raise KeyError
    assert not file.getvalue().endswith(" finished\n")


def test_a_device_shows_what_goes_to_its_cloud_and_back() -> None:
    scores: Any = {
        "event": "scores",
        "run": "dlora",
        "rounds_done": 1,
        "consensus": {"accuracy": 0.62},
        "peers_mean": None,
    }
    story: list[Any] = [
        STORY[1],
        {"event": "phase", "text": "waiting for the cloud hub: [b]hub is not who it should be"},
        {"event": "run", "run": "dlora", "rounds": 2, "local_steps": [5], "participants": 1},
        {"event": "step", "run": "dlora", "done": 5, "total": 10},
        {
            "event": "round",
            "run": "dlora",
            "round": 0,
            "loss": 0.6934,
            "bytes_on_wire": 0,
            "cloud_bytes": 50_900_000,
        },
    ]
    with Progress(terminal()) as progress:
        for event in story[:2]:
            progress(event)
        assert "waiting for the cloud hub: [b]hub is not who" in drawn(progress)
        for event in story[2:]:
            progress(event)
        shown = drawn(progress)
        assert "waiting" not in shown and "DLoRA" in shown and "1/2 rounds" in shown
        assert "loss 0.693, 50.9 MB with the cloud" in shown
        # scoring goes through the cloud too
        progress(scores | {"bytes_on_wire": 0, "cloud_bytes": 108_000_000})
        assert "loss 0.693, accuracy 62.0 %, 108 MB with the cloud" in drawn(progress)
        progress({"event": "phase", "text": "waiting for the cloud hub"})
        assert "waiting for the cloud hub" in drawn(progress)


def test_peers_with_a_cloud_show_both_wires() -> None:
    with Progress(terminal()) as progress:
        for event in STORY:
            progress(event | {"cloud_bytes": 3_000_000} if event["event"] == "round" else event)
        assert "1.4 MB, 3.0 MB with the cloud" in drawn(progress)


def lines(**options: Any) -> list[str]:
    """What is printed of the story where there is no terminal, without the time of day in front."""
    file = io.StringIO()
    with Progress(Console(file=file, force_terminal=False), **options) as progress:
        for event in STORY + END:
            progress(event)
    printed = file.getvalue().replace("\u00a0", " ").splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in printed)
    return [line[9:] for line in printed]


def test_where_there_is_no_terminal_a_line_says_what_has_begun() -> None:
    """Field case 15: what a cluster's log shows."""
    assert lines() == [
        STARTING,
        "loading model",
        "Dec-LoRA 0/2 rounds",
        "Dec-LoRA 1/2 rounds, loss 0.693, accuracy 84.3 %, 1.4 MB",
        "Alone 3 rounds",
        "finished",
    ]


def test_where_there_is_no_terminal_a_line_from_time_to_time_says_how_far_it_is() -> None:
    often = lines(lines_every_s=0.0)
    assert "Dec-LoRA 1/2 rounds, loss 0.693, 1.4 MB, scoring [b]peer, 1 of 3" in often
    assert [line for line in lines() if line not in often] == []
    assert len(often) > len(lines())


def test_quiet_prints_nothing() -> None:
    assert lines(quiet=True) == []


def test_a_scheduled_run_shows_who_is_active_and_what_that_costs() -> None:
    so_far = {"adapter_fraction": 1.0, "device_flops_fraction": 1.0, "device_flops": 8}
    active: Any = {
        "event": "active",
        "run": "dec-lora",
        "peer": "solo",
        "step": 0,
        "units": [0],
        **so_far,
    }
    units = [{"modules": ["a"], "cost": cost} for cost in (10, 30)]
    told: Any = {"event": "units", "run": "dec-lora", "units": units, "device_flops": 40}
    with Progress(terminal()) as progress:
        for event in (STORY[1], STORY[2] | {"local_steps": [5]}, told, active):
            progress(event)
        assert "units" not in drawn(progress)  # no step yet, nothing spent
        progress(STORY[3] | {"done": 3})
        assert "1 of 2 units, saved 75 % of adapter traffic, 80 % of device FLOPs" in drawn(
            progress
        )
        spent = {"adapter_fraction": 0.25, "device_flops_fraction": 0.2, "device_flops": 40}
        progress(active | {"step": 4, "units": [0, 1], **spent})
        progress(STORY[3] | {"done": 6})  # 4 steps of a quarter, 2 of all
        progress(STORY[4])
        note = (
            "loss 0.693, 2 of 2 units, saved 50 % of adapter traffic, 53 % of device FLOPs, 1.4 MB"
        )
        assert note in " ".join(drawn(progress).split())


def test_on_a_narrow_terminal_notes_stand_below_whole_and_the_bar_stays_whole() -> None:
    shown = {}
    for width in (80, 160):
        with Progress(Console(file=io.StringIO(), force_terminal=True, width=width)) as progress:
            for event in STORY:
                progress(event)
            shown[width] = drawn(progress, width).rstrip().splitlines()
    assert [line.count("1/2 rounds") for line in shown[80]] == [1, 0]
    assert shown[80][1].strip() == "Dec-LoRA: loss 0.693, accuracy 84.3 %, 1.4 MB"
    assert len(shown[160]) == 1 and "loss 0.693, accuracy 84.3 %, 1.4 MB" in shown[160][0]
    assert "…" not in "".join(shown[80] + shown[160])


def test_a_score_of_an_earlier_round_says_so() -> None:
    scores: Any = {
        "event": "scores",
        "run": "dec-lora",
        "peers_mean": None,
        "consensus": {"accuracy": 0.178},
    }
    with Progress(terminal()) as progress:
        for event in (*STORY[1:3], scores | {"rounds_done": 0}, STORY[4]):
            progress(event)
        assert "accuracy 17.8 % before training" in drawn(progress)
        progress(scores | {"rounds_done": 1})
        assert "accuracy 17.8 %, 1.4 MB" in drawn(progress)
        progress(STORY[4] | {"round": 1})
        assert "accuracy 17.8 % after round 1" in drawn(progress)


def test_a_run_whose_first_event_is_its_scoring_has_a_line() -> None:
    """`dlora eval` into a file that takes longer than a line's pause: its run has no bar yet."""
    file = io.StringIO()
    progress = Progress(Console(file=file), lines_every_s=0)
    scoring: Any = {
        "event": "evaluating",
        "run": "dec-lora",
        "what": "consensus",
        "done": 1,
        "total": 2,
    }
    progress(scoring)
    assert "Dec-LoRA" in file.getvalue() and "1 of 2" in file.getvalue()
