"""A run's folder made by hand, and its page as a parser reads it."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from dlora.events.log import RunLog
from kit.any_event import any_event

FINAL = {"dec-lora": 0.843, "dlora": 0.843, "pooled": 0.849, "local": 0.66, "fedavg": 0.845}
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """A strict reader: every element closed in its turn, the text of each kind kept."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(self.source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.words.append((self.open[-1], data.replace("\u00a0", " ")))

    def text(self, *tags: str) -> str:
        return " ".join(
            " ".join(data.split()) for tag, data in self.words if not tags or tag in tags
        )

    def pictures(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.seen if tag == "svg"]


def make_run(
    folder: Path,
    *,
    runs: tuple[str, ...] = ("dec-lora", "pooled", "local", "fedavg"),
    names: list[str] | None = None,
    labels: list[str] | None = None,
    metric: str = "accuracy",
    kind: str = "ring",
    period: int = 1,
    stop_at: int | None = None,
    model: str = "pkg://some_package/model",
    split: dict[str, Any] | None = None,
    participation: float | None = None,
) -> Path:
    """A run folder of 6 rounds; with `stop_at` the first run ends there and there is no summary.

    With `split` 30 MB go to the cloud and back in a round; a run named dlora is a device's, with
    one name.
    """
    names = names or [f"peer-{number}" for number in range(8)]
    count = len(names)
    peers = [
        {
            "name": name,
            "rows": 100 + index,
            "labels": {label: 10 + index for label in labels} if labels else None,
        }
        for index, name in enumerate(names)
    ]
    config = {
        "model": model,
        "data": {"train": "<b>train</b>.tsv", "labels": None},
        "peers": {"topology": {"kind": kind}},
        "output_dir": f"runs/{folder.name}",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    task = "causal-lm" if metric == "loss" else "classification"
    edges = [
        [[index, (index + shift + 1) % count] for index in range(count)] for shift in range(period)
    ]
    summary: dict[str, Any] = {"seconds": 75.0, "runs": {}}
    more: dict[str, Any] = {"split": split} if split else {}
    if participation is not None:
        more["participation"] = participation
    if "dlora" in runs:
        more["own"] = names[0]

    def scores(value: float) -> dict[str, float]:
        return {"accuracy": value, "f1": value, "loss": 1 - value} if metric == "accuracy" else {
            "loss": 4 - 2 * value, "perplexity": math.exp(4 - 2 * value)}  # fmt: skip

    with RunLog(folder / "log.jsonl") as log:
        log.emit(
            any_event(
                "start",
                version="0.1.0",
                model=model,
                task=task,
                metric=metric,
                runs=list(runs),
                peers=peers,
                edges=edges,
                spectral_gap=0.195,
                trainable_parameters=1234,
                message_bytes=4936,
                group_size=count,
                **more,
            )
        )
        for run in runs:
            sent = 0 if run in ("pooled", "local", "dlora") else 4936 * 2 * count
            log.emit(
                any_event("run", run=run, rounds=6, local_steps=[5] * count, participants=count)
            )
            for done in range(7):
                value = FINAL[run] - 0.3 * 0.5**done
                own = (
                    None
                    if run == "pooled" or done % 3
                    else {name: scores(value - 0.02) for name in names}
                )
                moved = {"cloud_bytes": 30_000_000 * done} if split else {}
                log.emit(
                    any_event(
                        "scores",
                        run=run,
                        rounds_done=done,
                        consensus=scores(value),
                        peers=own,
                        peers_mean=own and scores(value - 0.02),
                        bytes_on_wire=sent * done,
                        **moved,
                        seconds=2.0 * done,
                    )
                )
                if done == 6:
                    break
                if done == stop_at:
                    return folder
                distance = {
                    "dec-lora": 0.1 * 0.5**done,
                    "local": 0.1 * (done + 1),
                    "fedavg": 0.0,
                    "dlora": 0.0,
                }.get(run)
                log.emit(
                    any_event(
                        "round",
                        run=run,
                        round=done,
                        loss=1 - value,
                        losses=[1 - value] * count,
                        learning_rate=1e-3,
                        consensus_distance=distance,
                        bytes_on_wire=sent * (done + 1),
                        **moved,
                        seconds=2.0 * (done + 1),
                    )
                )
            log.emit(any_event("run-done", run=run))
            summary["runs"][run] = {
                "consensus": scores(FINAL[run]),
                "peers_mean": None if run == "pooled" else scores(FINAL[run] - 0.01),
                "peers": (
                    {}
                    if run == "pooled"
                    else {name: scores(0.5 + index / 100) for index, name in enumerate(names)}
                ),
                "best": {"rounds_done": 4, **scores(FINAL[run] + 0.001)},
                "bytes_on_wire": sent * 6,
                **({"cloud_bytes": 180_000_000} if split else {}),
                "seconds": 12.0,
                "participant_steps_per_second": 20.0,
            }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


CLOUD = {"cloud": "<hub>", "wire": "int8", "pipeline": 4}
