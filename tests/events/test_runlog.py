"""The log keeps what happened, forgets what a crash tore, and says so in one line when it
cannot.
"""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from dlora.config.arms import ARMS, Baseline
from dlora.errors import RunError
from dlora.events.log import RunLog, read_log
from dlora.events.record import run_records
from dlora.files import write_atomically
from dlora.show.words import bytes_text, count_text, score_text, seconds_text
from kit.any_event import any_event


def test_events_are_written_and_heard_ticks_only_heard(tmp_path: Path) -> None:
    heard: list[Any] = []
    with RunLog(tmp_path / "log.jsonl", [heard.append]) as log:
        log.emit(any_event("start", model="Charité \n", runs=["dec-lora"]))
        log.tick(any_event("step", run="dec-lora", done=1, total=5))
        log.emit(any_event("done", seconds=1.5))
    assert [event["event"] for event in heard] == ["start", "step", "done"]
    written = read_log(tmp_path / "log.jsonl")
    assert written == [heard[0], heard[2]]
    assert written[0]["model"] == "Charité \n"
    assert all(
        re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"]) for event in written
    )


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with RunLog(tmp_path / "log.jsonl") as log:
        log.emit(
            any_event(
                "round",
                loss=float("nan"),
                losses=[1.0, float("inf")],
                scores={"a": {"f1": float("-inf")}},
            )
        )
    line = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in line and "Infinity" not in line
    event = json.loads(line)
    assert (event["loss"], event["losses"], event["scores"]) == (
        None,
        [1.0, None],
        {"a": {"f1": None}},
    )


def test_an_event_is_on_the_file_before_the_listener_hears_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    seen: list[int] = []
    with RunLog(path, [lambda _event: seen.append(len(read_log(path)))]) as log:
        log.emit(any_event("a"))
        log.emit(any_event("b"))
    assert seen == [1, 2]


def test_resume_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.emit(any_event("a"))
        position = log.position
        assert position == path.stat().st_size
        log.emit(any_event("lost"))
    with RunLog(path) as log:
        log.truncate(position)
        log.emit(any_event("b"))
        assert log.position == path.stat().st_size
    assert [event["event"] for event in read_log(path)] == ["a", "b"]


def test_a_position_beyond_the_log_is_refused(tmp_path: Path) -> None:
    with RunLog(tmp_path / "log.jsonl") as log:
        log.emit(any_event("a"))
        size = log.position
        with pytest.raises(
            RunError, match=f"holds {size} bytes, the checkpoint was made at {size + 1}"
        ):
            log.truncate(size + 1)
        assert log.position == size


@pytest.mark.parametrize("torn", ['{"event": "b", "ti', "\0" * 200_000, "x"])
def test_a_torn_last_line_is_ignored_and_never_glued_to_the_next(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "a"}\n' + torn)
    assert [event["event"] for event in read_log(path)] == ["a"]
    with RunLog(path) as log:
        log.emit(any_event("b"))
    assert [event["event"] for event in read_log(path)] == ["a", "b"]


def test_a_log_that_is_only_a_torn_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "st')
    assert read_log(path) == []
    RunLog(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("bad", ["{half", "[1, 2]", '{"no": "event"}', '{"event": 3}', ""])
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "a"}\n' + bad + '\n{"event": "b"}\n')
    with pytest.raises(RunError, match="line 2: expected a JSON object with an event"):
        read_log(path)


def test_a_missing_log_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        read_log(tmp_path / "log.jsonl")
    with pytest.raises(RunError, match="cannot be written"):
        RunLog(tmp_path / "no folder" / "log.jsonl")


def test_a_full_disk_is_a_run_error(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    heard: list[Any] = []
    with (
        RunLog(tmp_path / "log.jsonl", [heard.append]) as log,
        pytest.raises(RunError, match="no space left on device"),
    ):
        log.emit(any_event("a"))
    assert heard == []


def test_a_whole_file_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old é")
    assert path.read_text(encoding="utf-8") == "old é"

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"no space left on device while writing .*summary\.json"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "old é"
    assert os.listdir(tmp_path) == ["summary.json"]
    write_atomically(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"


def test_a_folder_that_is_not_there_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        write_atomically(tmp_path / "none" / "file", "x")


def test_figures_as_people_write_them() -> None:
    plain = [
        text.replace("\u00a0", " ")
        for text in (bytes_text(0), bytes_text(999), bytes_text(1500), bytes_text(2.239e8))
    ]
    assert plain == ["0 B", "999 B", "1.5 kB", "224 MB"]
    assert [seconds_text(s).replace("\u00a0", " ") for s in (4.21, 59.96, 83, 7500)] == [
        "4.2 s",
        "1 min 0 s",
        "1 min 23 s",
        "2 h 5 min",
    ]
    assert score_text(0.8434, "accuracy").replace("\u00a0", " ") == "84.3 %"
    assert (
        score_text(0.51234, "loss"),
        score_text(12.345, "perplexity"),
        score_text(None, "f1"),
    ) == (
        "0.512",
        "12.35",
        "–",
    )


def test_an_unfinished_run_is_told_by_its_latest_events() -> None:
    start = {"event": "start", "runs": ["dec-lora", "local"]}
    scores = {
        "event": "scores",
        "run": "dec-lora",
        "rounds_done": 1,
        "bytes_on_wire": 10,
        "peers_mean": None,
    }
    events: list[dict[str, Any]] = [
        start,
        {"event": "run", "run": "dec-lora", "rounds": 4},
        {"event": "round", "run": "dec-lora", "round": 0, "bytes_on_wire": 10},
        scores | {"consensus": {"accuracy": 0.5}},
        scores | {"consensus": None, "peers_mean": {"accuracy": 0.4}},
        {"event": "round", "run": "dec-lora", "round": 1, "bytes_on_wire": 20},
    ]
    dec_lora, local = run_records(events, start, {})
    assert (dec_lora.rounds, dec_lora.rounds_done, dec_lora.done, local.rounds_done) == (
        4,
        2,
        False,
        0,
    )
    assert dec_lora.last("bytes_on_wire") == 20  # the round's, not the older scores'
    assert dec_lora.scores[1]["consensus"] == {"accuracy": 0.5} and dec_lora.scores[1][
        "peers_mean"
    ] == {"accuracy": 0.4}
    assert local.figure({"consensus": {"loss": 1.0}, "peers_mean": {"loss": 2.0}}, "loss") == 2.0


def test_a_mean_of_counts_has_no_exponent() -> None:
    assert [count_text(count) for count in (2, 7.5, 99.96, 2000.0, 2000.4, 1e6)] == [
        "2", "7.5", "100", "2,000", "2,000", "1,000,000",
    ]  # fmt: skip


def test_what_the_config_can_compare_with_are_the_baselines() -> None:
    assert {arm.name for arm in ARMS.values() if arm.baseline} == set(get_args(Baseline))
