"""The lying member of a history: it runs the program, and its lies change what it tells."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from dlora.decentralized.peer.messages_on_disk import round_message, round_of
from dlora.wire.peer.frames import Chunk, Decided, Frame, Have, Hello, Offer, Status, Want
from dlora.wire.tensors import decode_tensors, encode
from kit.drawn_histories import Lie
from kit.virtual_federation import SIZE, World, expected


class Member:
    """A liar: it runs the program, and tells what ``lies`` make of each frame."""

    def __init__(self, world: World, name: str, lies: tuple[Lie, ...]) -> None:
        self.world, self.name, self.lies = world, name, lies
        self.told = 0
        self.contents: dict[tuple[str, str], bytes] = {}  # of what it has told: the same for ever
        self.claimed = round_message(world.rounds - 1)

    def _to(self, there: str) -> list[Lie]:
        number = self.world.names.index(there)
        return [lie for lie in self.lies if number in lie.to and self.told >= lie.after]

    def tells(self, there: str, frame: Frame) -> list[Frame]:
        self.told += 1
        frames = [frame]
        for lie in self._to(there):
            frames = [told for frame in frames for told in self._lie(lie, there, frame)]
        return [self._content(there, told) for told in frames]

    def _lie(self, lie: Lie, there: str, frame: Frame) -> list[Frame]:
        match lie.kind, frame:
            case "ahead", Status(round):
                return [Status(round + int(min(abs(lie.value), 1000)))]
            case "ahead", Hello(_, _, round):
                return [replace(frame, round=round + int(min(abs(lie.value), 1000)))]
            case "claims", Status():
                self.contents.setdefault(
                    (there, self.claimed), self._message(self.claimed, lie.value)
                )
                return [frame, self._offer(there, self.claimed)]
            case "claims", Offer(name) if round_of(name) is not None:
                return []
            case "flips", Decided(round, committed):
                return [replace(frame, committed=not committed)]
            case "promises", Status(round) if there < self.name:
                return [frame, Have(round), Have(max(0, round - 1)), Have(round + 1)]
            case "decides", Status(round) if self.name < there:
                return [
                    frame,
                    Decided(round, lie.value > 0),
                    Decided(max(0, round - 1), lie.value > 0),
                ]
            case "keeps back", _:
                kind = (Chunk, Have, Decided, Offer, Status)[int(abs(lie.value)) % 5]
                return [] if isinstance(frame, kind) else [frame]
            case "floods", _:
                return [frame, *[Status(getattr(frame, "round", 0))] * 20]
        return [frame]

    def answers(self, there: str, frame: Frame) -> list[Frame]:
        if (
            isinstance(frame, Want)
            and (there, frame.name) in self.contents
            and self.world_own(frame.name) is None
        ):
            return [
                Chunk(frame.name, frame.offset, self.contents[there, frame.name][frame.offset :])
            ]
        return []

    def world_own(self, name: str) -> Path | None:
        sent = self.world.folder / self.name / "sent"
        return next(sent.glob(f"{name}.*.safetensors"), None)

    def _content(self, there: str, frame: Frame) -> Frame:
        """An offer and its bytes, as the lies about contents make them."""
        if not isinstance(frame, Offer | Chunk):
            return frame
        if (there, frame.name) not in self.contents:
            own = self.world_own(frame.name)
            if own is None:
                return frame
            self.contents[there, frame.name] = self._changed(there, frame.name, own)
        if isinstance(frame, Offer):
            return self._offer(there, frame.name)
        return Chunk(
            frame.name,
            frame.offset,
            self.contents[there, frame.name][frame.offset :][: len(frame.data)],
        )

    def _offer(self, there: str, name: str) -> Offer:
        content = self.contents[there, name]
        return Offer(name, len(content), hashlib.sha256(content).hexdigest())

    def _changed(self, there: str, name: str, own: Path) -> bytes:
        tensors = decode_tensors(own, expected(name))
        for lie in self._to(there):
            if lie.kind == "scaled" or (
                lie.kind == "two faces" and self.world.names.index(there) % 2
            ):
                tensors["x"] = tensors["x"] * lie.value
            if lie.kind == "counts" and "num_peers" in tensors:
                tensors["num_peers"] = torch.full_like(tensors["num_peers"], abs(lie.value))
        return encode(tensors, torch.float64)

    def _message(self, name: str, value: float) -> bytes:
        return encode({"x": torch.full((SIZE,), value)}, torch.float64)
