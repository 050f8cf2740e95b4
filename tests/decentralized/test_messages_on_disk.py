"""What is read again from the exchange folder is what was written there; one bit less is noticed.

A bit is flipped while the peer does not run, and every file of the folder is tried.
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.messages_on_disk import round_message, round_of
from dlora.decentralized.peer.neighbour import Neighbour
from dlora.errors import RunError
from dlora.wire.frame import Misbehaviour
from dlora.wire.peer.frames import Chunk, Frame, Offer, Want
from kit import virtual_clock
from kit.virtual_federation import World

pytestmark = pytest.mark.usefixtures("disk_of_a_virtual_world")


def flip(path: Path, place: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def opened(folder: Path) -> Ledger:
    ledger = Ledger(folder)
    ledger.close()
    return ledger


def is_told(folder: Path, path: Path, what_to_do: str) -> None:
    with pytest.raises(RunError) as caught:
        Ledger(folder)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert what_to_do in str(caught.value)


@pytest.mark.parametrize("place", [0, 7, -1])
def test_an_own_message_that_nobody_has_promised_yet(place: int, tmp_path: Path) -> None:
    """Field case 36: a neighbour may have what was offered, so it is not made again."""
    ledger = Ledger(tmp_path)
    path = ledger.keep(round_message(0), b"what is offered").path
    ledger.close()
    flip(path, place)
    is_told(tmp_path, path, "neighbours may have it; restore exchange/ from a copy")


@pytest.mark.parametrize("message", ["sum", "average", round_message(4)])
def test_a_received_message_can_be_had_again(message: str, tmp_path: Path) -> None:
    """Field case 36: without the file the peer goes on, and asks for it."""
    ledger = Ledger(tmp_path)
    content = b"what b offered"
    partial = ledger.partial("b", message, hashlib.sha256(content).hexdigest())
    partial.write_bytes(content)
    ledger.arrived("b", message, partial)
    ledger.close()
    whole = opened(tmp_path).received("b", message)
    assert whole is not None and whole.path.read_bytes() == content
    flip(whole.path)
    is_told(tmp_path, whole.path, "remove that file, then add --resume: b sends it again")
    whole.path.unlink()
    assert opened(tmp_path).received("b", message) is None


def test_every_file_of_a_folder_at_the_end_of_a_run(tmp_path: Path) -> None:
    """Field case 36: messages of rounds, sums and averages of both sides, the ledger and its id."""
    world = World(tmp_path, num_peers=3, rounds=2)
    virtual_clock.run(world.run())
    tried = set()
    for name in world.names:
        for path in sorted((tmp_path / name).rglob("*")):
            if path.is_file():
                flip(path, -2)
                is_told(tmp_path / name, path, "--resume")
                flip(path, -2)
                tried.add(path.name.partition(".")[0])
    assert {"sum", "average", round_message(1), "edges", "id"} <= tried


def test_a_message_of_a_promise_is_read_through_before_it_is_mixed(tmp_path: Path) -> None:
    """Field case 36: b promised, the decision comes later; meanwhile a bit of a's message turns."""
    world = World(tmp_path, num_peers=2, rounds=2)
    flipped: list[Path] = []

    def damage(name: str, event: str) -> bool:
        if (name, event) == ("b", "after promised") and not flipped:
            [path] = (tmp_path / "b" / "received" / "a").glob("*.safetensors")
            flip(path, -1)
            flipped.append(path)
        return False

    world.fault = damage

    async def plan(world: World) -> None:
        [outcome] = await asyncio.gather(world.tasks["b"], return_exceptions=True)
        assert isinstance(outcome, RunError) and str(flipped[0]) in str(outcome)
        assert "the edge with a needs it; restore exchange/ from a copy" in str(outcome)
        world.tasks.pop("b")

    virtual_clock.run(world.run(plan))
    assert "b" not in world.commits and set(world.results) == {"a"}


def test_files_without_a_hash_in_their_names_are_taken_as_they_are(tmp_path: Path) -> None:
    """A folder of an earlier dlora goes on; what its ledger tells of a message is checked."""
    world = World(tmp_path, num_peers=2, rounds=2)
    virtual_clock.run(world.run())
    id = tmp_path / "a" / "id"
    id.write_text(id.read_text().partition("\n")[0])
    renamed = [
        path.rename(path.with_name(f"{path.name.partition('.')[0]}.safetensors"))
        for path in (tmp_path / "a").rglob("*.safetensors")
    ]
    ledger = opened(tmp_path / "a")
    assert ledger.own("average") and ledger.newest_round_sent() == 1
    assert [due.round for due in ledger.due(ledger.position - 1)] == [1]
    for path in renamed:
        if round_of(path.stem) is not None:
            flip(path)
            is_told(tmp_path / "a", path, "the edge with b needs it; restore exchange/")
            flip(path)


def test_a_damaged_beginning_is_fetched_anew_and_blames_nobody(tmp_path: Path) -> None:
    """Field case 36: the first half lay on this disk over a restart; the sender has done nothing
    wrong.
    """
    ledger, neighbour, said = Ledger(tmp_path), Neighbour("a"), list[Frame]()
    neighbour.say = lambda frame: said.append(frame)  # type: ignore[method-assign]
    content = b"both halves"
    offer = Offer("sum", len(content), hashlib.sha256(content).hexdigest())
    ledger.partial("a", "sum", offer.sha256).write_bytes(b"b0th")

    async def hear() -> None:
        def store(chunk: Chunk) -> bool:
            return neighbour.store(chunk, ledger, lambda *told: None)

        neighbour.fetch(offer, ledger)
        assert not store(Chunk("sum", 4, content[4:]))
        assert said == [Want("sum", 4), Want("sum", 0)]
        assert store(Chunk("sum", 0, content))
        ledger.forget_reduction()
        neighbour.fetch(offer, ledger)
        with pytest.raises(Misbehaviour, match="not the content that was offered"):
            store(Chunk("sum", 0, content[::-1]))

    asyncio.run(hear())
    ledger.close()
