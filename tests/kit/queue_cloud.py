"""Both halves of a split in one process over plain queues, without a wire; every frame can be
watched or stopped.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dlora.config.cloud import CloudConfig
from dlora.config.run import Config
from dlora.data.batches import Batch, collate
from dlora.data.formats import Example
from dlora.events.serving import DeviceEvent
from dlora.lora.adapt import adapt
from dlora.lora.core import Directions
from dlora.lora.factors import Factors, adds, stack
from dlora.lora.stacked import StackedModel
from dlora.model.load import load_model, load_tokenizer
from dlora.split.cloud.body import Body, load_body
from dlora.split.cloud.limits import Budget, Limits
from dlora.split.cloud.session import Session
from dlora.split.device.calls import Calls
from dlora.split.device.half import Half, load_half
from dlora.wire.frame import ChannelDown
from dlora.wire.split.frames import SplitFrame

LIMITS = Limits(max_tokens=4096, max_parts=64, idle_s=20.0)
PATIENCE_S = 30.0  # for a frame that must come


SESSIONS: list[Session] = []  # of the test under way


def close_sessions() -> None:
    """End what a test left: its threads must be gone before the process goes."""
    while SESSIONS:
        session = SESSIONS.pop()
        session.close()
        session._threads.shutdown(wait=True)


class QueueChannel:
    """The device's end of a link to a session; ``seen`` hears (up, frame) and may raise
    ChannelDown.
    """

    def __init__(
        self, cloud: QueueCloud, device: str, seen: Callable[[bool, SplitFrame], None]
    ) -> None:
        self.down: queue.Queue[SplitFrame] = queue.Queue()
        self.seen, self.cut = seen, False
        self.session = Session(
            device, cloud.body, cloud.limits, cloud.budget, self._down, cloud.tell
        )
        SESSIONS.append(self.session)

    def _down(self, frame: SplitFrame) -> None:
        if self.cut:
            raise ChannelDown
        self.down.put(frame)

    def send(self, frame: SplitFrame) -> None:
        self._watched(True, frame)
        self.session.hear(frame)

    def receive(self) -> SplitFrame:
        if self.cut:
            raise ChannelDown
        frame = self.down.get(timeout=PATIENCE_S)
        self._watched(False, frame)
        return frame

    def _watched(self, up: bool, frame: SplitFrame) -> None:
        if self.cut:
            raise ChannelDown
        try:
            self.seen(up, frame)
        except ChannelDown:
            self.cut = True
            self.session.close()
            raise


class QueueCloud:
    """A cloud for any number of devices, and what it told."""

    def __init__(self, body: Body, limits: Limits = LIMITS, memory_bytes: int = 10**9) -> None:
        self.body, self.limits, self.budget = body, limits, Budget(memory_bytes)
        self.told: list[DeviceEvent] = []
        self.channels: list[QueueChannel] = []

    def tell(self, event: DeviceEvent) -> None:
        self.told.append(event)

    def dial(
        self,
        device: str = "phone",
        seen: Callable[[bool, SplitFrame], None] = lambda up, frame: None,
    ) -> Callable[[], QueueChannel]:
        """What `Half.link` takes: a new channel to a new session each time."""

        def dial() -> QueueChannel:
            self.channels.append(QueueChannel(self, device, seen))
            return self.channels[-1]

        return dial


def config(folder: Path, task: str = "classification", /, **overrides: Any) -> Config:
    """A device's config for a tiny model; paths override keys."""
    tree: dict[str, Any] = {
        "model": str(folder),
        "task": task,
        "device": "cpu",
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {"train": "unread", "eval": "unread", "max_length": 16},
        "split": {"cloud": "cloud", "wire": "float32"},
    }
    for path, value in overrides.items():
        *parents, leaf = path.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return Config.parse(tree)


def cloud_body(folder: Path, frame: Directions | None = None) -> Body:
    """``frame``: by the names that a model around the body has for its modules."""
    body = load_body(CloudConfig.parse({"model": str(folder), "device": "cpu"}))
    body.directions = {name.partition(".")[2]: tensor for name, tensor in (frame or {}).items()}
    return body


def device_half(config: Config, frame: Directions | None = None) -> Half:
    return load_half(config, load_tokenizer(config.model), labels(config), frame)


def whole_model(config: Config) -> StackedModel:
    """The same model and factors with the body here: the oracle, itself equal to PEFT by law 1."""
    frozen = load_model(config, load_tokenizer(config.model), labels(config))
    return adapt(frozen, config)


def labels(config: Config) -> list[str] | None:
    names = {
        "classification": ["no", "yes"],
        "multi-label": ["kind", "film", "very"],
        "token-classification": ["B-HOW", "B-THING", "I-HOW", "O"],
    }
    return names.get(config.task)


def link(half: Half, cloud: QueueCloud, pipeline: int = 1, **dial: Any) -> Calls:
    return half.link(cloud.dial(**dial), pipeline, lambda seconds: None)


def batch(
    task: str = "classification", lengths: tuple[int, ...] = (5, 9, 3, 7), seed: int = 0
) -> Batch:
    """Rows of uneven lengths out of the tiny vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(4, 20, (count,), generator=generator).tolist()

    def label(index: int, length: int) -> int | float | tuple[float, ...] | list[int]:
        match task:
            case "classification":
                return index % 2
            case "regression":
                return index / 2
            case "multi-label":
                return float(index % 2), float(index > 1), 1.0
            case "token-classification":
                return [-100, *(place % 4 for place in range(length - 1))]
        return words(length)

    rows = [Example(words(length), label(index, length)) for index, length in enumerate(lengths)]
    return collate(rows, 0)


def factors(model: StackedModel, seed: int = 0) -> Factors:
    """One participant's, with B, M or up not zero, ready to train."""
    generator = torch.Generator().manual_seed(seed)
    made = stack(model.initial, 1)
    for name, tensor in made.items():
        if adds(name):
            tensor.normal_(std=0.1, generator=generator)
        tensor.requires_grad_()
    return made


__all__ = [
    "QueueChannel",
    "QueueCloud",
    "batch",
    "cloud_body",
    "config",
    "device_half",
    "factors",
    "labels",
    "link",
]
