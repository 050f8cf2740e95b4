"""Devices that are neighbours of each other and have a cloud."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dlora.config.run import Config
from dlora.identity.federation import federation_text
from dlora.identity.keys import new_identity
from kit.call_cli import Outcome
from kit.ports import free_ports
from kit.processes import HUB, Split

DEVICES = ("phone", "tablet")
LISTENS = "phone"  # the other one only dials
ATTIC = "attic"  # another cloud


class Both(Split):
    """Devices that are each other's neighbours, the first of them with an address; hub is there for
    all.
    """

    def __init__(
        self, folder: Path, model: Path, changes: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        super().__init__(folder, model, changes, devices=DEVICES, **more)
        members = [folder / f"{name}.member.yaml" for name in (HUB, *DEVICES)]
        port, self.attic = free_ports(4)[2:]  # the first two are the hub's
        members.append(new_identity(ATTIC, f"127.0.0.1:{self.attic}", "cloud", folder)[1])
        tree = yaml.safe_load(federation_text(members))
        for member in tree["members"]:
            if member["name"] == LISTENS:
                member["address"] = f"127.0.0.1:{port}"
        (folder / "federation.yaml").write_text(yaml.safe_dump(tree))

    def config(self, name: str, changes: Mapping[str, Any] | None = None) -> Config:
        files = {each: str(self.folder / f"{each}.jsonl") for each in DEVICES}
        shared = {
            "data.train": files,
            "peers.members": list(DEVICES),
            "peers.weights": "laplacian",
            "eval_every": 2,
        }
        return super().config(name, {**shared, **self.changes, **(changes or {})})

    def arguments(self, name: str, *more: str) -> list[str]:
        if name == ATTIC:
            listen = ["--set", f"listen=127.0.0.1:{self.attic}", "--set", "metrics=null"]
            return [
                "cloud",
                str(self.folder / "cloud.yaml"),
                *self.credentials(name),
                *listen,
                *more,
            ]
        return super().arguments(name, *more)

    def start_all(self, *more: str) -> None:
        for name in DEVICES:
            self.start(name, *more)

    def finish_all(self) -> dict[str, Outcome]:
        return {name: self.finish(name) for name in DEVICES}

    def result(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = self.summary(name)["runs"]["dec-lora"]
        return result
