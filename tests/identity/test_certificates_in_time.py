"""Certificates that end, or that a wrong clock makes end: both ends are told in time."""

from __future__ import annotations

import asyncio
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlora.errors import IdentityError
from dlora.identity.federation import Federation, federation_text
from dlora.identity.keys import Identity, new_identity
from dlora.wire.frame import Link
from kit.call_cli import call
from kit.loopback import Loopback, run, running
from kit.made_certificates import clock_ahead, made, one_line


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize(
    ("left_s", "says"),
    [
        (64, r"in \d\d s\b"),
        (1800, r"in (29|30) minutes\b"),
        (3 * 86_400, r"in 3 days\b"),
        (20 * 86_400, None),
    ],
)
def test_a_certificate_that_ends_soon_is_warned_of(
    left_s: float, says: str | None, tmp_path: Path
) -> None:
    """Field case 44: by `identity show` of the key and of the federation file, and whenever a run
    takes the key.
    """
    made("north", tmp_path, left_s + 0.9)
    federation = tmp_path / "federation.yaml"
    federation.write_text(federation_text([tmp_path / "north.member.yaml"]))
    for file in (tmp_path / "north.key", federation):
        outcome = call("identity", "show", file)
        assert outcome.exit_code == 0
        if says is None:
            assert outcome.err == ""
        else:
            assert re.search(says, one_line(outcome.err)) and "identity new north" in outcome.err
    with warnings.catch_warnings(record=True) as warned:
        Identity.load("north", tmp_path / "north.key", Federation.load(federation))
    assert [str(warning.message)[:24] for warning in warned] == (
        [] if says is None else ["the certificate of north"]
    )


class Watched(Loopback):
    """a listens, b dials; what the networks tell of certificates."""

    def __init__(self, folder: Path, prepare: Callable[[Path], object]) -> None:
        super().__init__(folder, listening="a")
        for name in "ab":
            for file in (f"{name}.key", f"{name}.member.yaml"):
                (folder / file).unlink()
        prepare(folder)
        self.path.write_text(federation_text([folder / f"{name}.member.yaml" for name in "ab"]))
        self.told: dict[str, list[str]] = {"a": [], "b": []}

    def identity(self, name: str) -> Identity:
        """Whatever the time is: here the network is to find out."""
        pem = (self.folder / f"{name}.key").read_text()
        return Identity(name, pem.encode(), pem[pem.index("-----BEGIN CERT") :].encode())

    def network(self, name: str, **overrides: Any) -> Any:
        told = self.told[name].append
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Identity, "load", lambda name, *_: self.identity(name))
            return super().network(name, on_certificate=told, **overrides)

    async def meet(self, until: Callable[[], bool]) -> list[str]:
        """Serve both until something is true; who got a conversation."""
        talked: list[str] = []

        async def talk(name: str, link: Link) -> None:
            talked.append(name)
            await link.receive()

        async with self.serve("a", talk), running(self.network("b").serve(talk)):
            while not until():
                await asyncio.sleep(0.01)
        return talked


def pair_of(ends: dict[str, float]) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        for name, left_s in ends.items():
            made(name, folder, left_s)

    return prepare


DAY_S = 86_400.0


def test_a_running_owner_and_its_neighbours_are_told_that_a_certificate_ends(
    tmp_path: Path,
) -> None:
    """Field case 44: at each stage once, and at the end; the link that is up goes on."""
    watched = Watched(tmp_path, pair_of({"a": 100 * DAY_S, "b": 2 * DAY_S + 5}))

    def both() -> bool:
        return bool(watched.told["a"] and watched.told["b"])

    run(_quietly(watched, both))
    assert len(watched.told["a"]) == len(watched.told["b"]) == 1
    assert (
        watched.told["b"][0].startswith("our certificate, of b, ends at 20")
        and "in 2 days" in watched.told["b"][0]
    )
    assert (
        watched.told["a"][0].startswith("the certificate of b ends at 20")
        and "dlora identity new b" in watched.told["a"][0]
    )


async def _quietly(watched: Watched, until: Callable[[], bool]) -> None:
    await watched.meet(until)


def test_each_stage_is_told_once(tmp_path: Path) -> None:
    """Field case 44: a run of 20 days, in which nobody renews anything."""
    from dlora.net.watch import Watch

    made("a", tmp_path, 20 * DAY_S)
    pem = (tmp_path / "a.key").read_text()
    told: list[str] = []
    watch = Watch(Identity("a", b"", pem[pem.index("-----BEGIN CERT") :].encode()), told.append)
    nobody = Federation({})
    for hour in range(24 * 21):
        with clock_ahead(hours=hour):
            watch.look(nobody, ())
    spans = [line.split(", in ")[1].split(";")[0] for line in told[:-1]]
    assert spans == ["14 days", "3 days", "24 hours", "6 hours", "60 minutes"]
    assert "expired at 20" in told[-1] and len(told) == 6


def test_a_certificate_that_ended_during_the_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field case 30: both ends say whose it is, where TLS tells the one who dials no more than that
    the line went dead.
    """
    monkeypatch.setattr("dlora.net.options.HANG_UPS", 2)
    watched = Watched(tmp_path, pair_of({"a": 100 * DAY_S, "b": -60.0}))
    talked: list[str] = []

    async def main() -> None:
        talked.extend(
            await watched.meet(
                lambda: bool(watched.told["a"] and watched.told["b"] and watched.refused)
            )
        )

    run(main())
    assert talked == []
    assert "our certificate, of b, expired at 20" in watched.told["b"][0]
    assert "the certificate of b expired at 20" in watched.told["a"][0]
    assert (
        watched.refused[0].startswith("dialling a: it hangs up in the handshake: ")
        and "clocks is wrong" in watched.refused[0]
    )


def test_a_clock_that_is_an_hour_behind_is_named(tmp_path: Path) -> None:
    """Field case 30: b was made just now on a machine whose clock is right, and a's is an hour
    behind.
    """

    def ahead(folder: Path) -> None:
        new_identity("a", None, "peer", folder)
        with clock_ahead(hours=1):
            new_identity("b", None, "peer", folder)

    watched = Watched(tmp_path, ahead)
    run(_quietly(watched, lambda: bool(watched.told["a"])))
    [line] = watched.told["a"]
    assert line.startswith("the certificate of b is valid from 20")
    assert line.endswith("UTC: the clock here is behind, or its maker's was ahead")


def test_an_own_certificate_of_the_future_is_refused_before_a_run(tmp_path: Path) -> None:
    """Field case 30."""
    with clock_ahead(hours=1):
        new_identity("north", None, "peer", tmp_path)
    (tmp_path / "federation.yaml").write_text(federation_text([tmp_path / "north.member.yaml"]))
    with pytest.raises(IdentityError, match=r"is valid from 20.*here it is 20.*set the clock"):
        Identity.load(
            "north", tmp_path / "north.key", Federation.load(tmp_path / "federation.yaml")
        )
