"""How a run is opened and closed: which run a folder holds, and what an error leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dlora.config.run import Config
from dlora.errors import CloudError, ConfigError, NeighbourError, RunError, UserError
from dlora.events.log import read_log
from dlora.run.folder import RunFolder
from dlora.run.opening import check_alike, opened
from dlora.run.prepare import prepare
from kit.any_event import any_event
from kit.scheduled_peers import KR, federation

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize(
    ("changes", "own", "is_this"),
    [
        ({}, None, True),
        ({"eval_peers": "none"}, None, True),  # with --resume it goes on
        ({"train.rounds": 4}, None, True),
        ({"train.rounds": 2}, None, False),
        ({"seed": 1}, None, False),
        ({}, "north", False),
    ],
)
def test_a_folder_holds_this_run_where_resume_would_go_on_with_it(
    changes: dict[str, object], own: str | None, is_this: bool, make_config: MakeConfig
) -> None:
    """A start without --resume and one with it are told the same about what stands there."""
    folder = RunFolder.create(make_config())
    folder.log_path.write_text(json.dumps({"event": "start"}) + "\n")
    config = make_config(**changes)
    with pytest.raises(RunError, match="holds this run" if is_this else "holds another run"):
        RunFolder.check_new(config, own)
    try:
        RunFolder.check_same(config, own)
        goes_on = True
    except RunError:
        goes_on = False
    assert goes_on == is_this


@pytest.mark.parametrize("error", [NeighbourError, CloudError])
def test_who_is_refused_before_it_trained_leaves_no_folder(
    error: type[UserError], make_config: MakeConfig, tmp_path: Path
) -> None:
    config = federation(make_config, KR).model_copy(
        update={"output_dir": str(tmp_path / "deep" / "run")}
    )

    def refused(resume: bool, trained: bool) -> None:
        with (
            pytest.raises(error, match="refused"),
            opened(config, ["dec-lora"], own="north", resume=resume) as run,
        ):
            (run.folder.path / "exchange").mkdir(exist_ok=True)
            run.began = trained
            raise error("refused")

    refused(resume=False, trained=False)
    assert not (tmp_path / "deep").exists()
    refused(resume=False, trained=True)
    refused(resume=True, trained=False)
    assert Path(config.output_dir, "config.yaml").exists()


@pytest.mark.parametrize("own", [None, "north"])
def test_a_simulation_tells_again_what_it_does_again_and_a_peer_keeps_what_it_said(
    own: str | None, make_config: MakeConfig
) -> None:
    """What a peer's log says of its neighbours happened, though no checkpoint was made since."""
    config = federation(make_config, KR)
    for resume in (False, True):
        with opened(config, ["dec-lora"], own=own, resume=resume) as run:
            run.log.emit(any_event("linked", neighbour="south"))
    events = [event["event"] for event in read_log(run.folder.log_path)]
    assert events == ["start", "linked"] + ["linked"] * (own is not None)
    manifest = json.loads((run.folder.path / "manifest.json").read_text())
    assert manifest.get("rounds") == (None if own is None else config.train.rounds)


def test_ranks_with_other_rows_are_refused(make_config: Callable[..., Config]) -> None:
    """The same path on two machines may hold different files."""
    prepared = prepare(make_config())

    def gathered(facts: dict[str, str]) -> list[dict[str, str]]:
        return [facts, facts | {"rows of peer-1": "other"}]

    ranks: Any = SimpleNamespace(
        are_several=True, size=2, gathered=gathered, told_once=lambda error: error
    )
    with pytest.raises(ConfigError, match="^rank 1 of 2 is in another run: rows of peer-1 is"):
        check_alike(ranks, prepared)
