"""A ledger that is shorter than its checkpoint, or damaged, is noticed: a line less would mix an
edge at one end only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.messages_on_disk import round_message
from dlora.errors import RunError

Lines = list[bytes]


def written(folder: Path) -> tuple[int, str, Path]:
    """Three committed rounds with b, the last of them not in the checkpoint; returns its position,
    its hash and the file.
    """
    ledger = Ledger(folder)
    for round in range(3):
        if round == 2:
            position = ledger.position
        ledger.keep(round_message(round), b"own %d" % round)
        theirs = b"theirs %d" % round
        partial = ledger.partial("b", round_message(round), hashlib.sha256(theirs).hexdigest())
        partial.write_bytes(theirs)
        ledger.arrived("b", round_message(round), partial)
        ledger.record(round, "b", "promised")
        ledger.record(round, "b", "committed")
    ledger.close()
    return position, ledger.chain(position), folder / "edges.jsonl"


def read(folder: Path, position: int, chain: str | None) -> Ledger:
    ledger = Ledger(folder)
    try:
        ledger.check(position, chain, 0)
    finally:
        ledger.close()
    return ledger


def test_a_whole_ledger_goes_on(tmp_path: Path) -> None:
    position, chain, _ = written(tmp_path)
    assert [due.round for due in read(tmp_path, position, chain).due(position)] == [2]


DAMAGES: dict[str, Callable[[Lines], Lines]] = {
    "a line removed": lambda lines: lines[:1] + lines[2:],
    "the first line removed": lambda lines: lines[1:],
    "restored from a backup": lambda lines: lines[:3],
    "emptied": lambda lines: [],
    "two lines exchanged": lambda lines: [lines[1], lines[0], *lines[2:]],
    "another round": lambda lines: [lines[0].replace(b'"round": 0', b'"round": 1'), *lines[1:]],
    "another decision": lambda lines: [*lines[:5], lines[5].replace(b"committed", b"dropped")],
    "no JSON": lambda lines: [b"{" + lines[0], *lines[1:]],
    "a field missing": lambda lines: [b'{"event": "promised", "round": 0}\n', *lines[1:]],
    "a name that is a path": lambda lines: [lines[0].replace(b'"b"', b'"../../b"'), *lines[1:]],
    "a round that is none": lambda lines: [
        lines[0].replace(b'"round": 0', b'"round": "0"'),
        *lines[1:],
    ],
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_ledger_is_one_line(what: str, tmp_path: Path) -> None:
    """Field cases 36, 42 and 35's kind: whichever line is gone or changed, the run is not gone on
    with.
    """
    position, chain, path = written(tmp_path)
    path.write_bytes(b"".join(DAMAGES[what](path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(RunError, match="restore exchange/ from a copy") as caught:
        read(tmp_path, position, chain)
    assert (
        str(path) in str(caught.value)
        and "\n" not in str(caught.value)
        and "remove that line" not in str(caught.value)
    )


@pytest.mark.parametrize(
    "message", ["sent/round-000002.*.safetensors", "received/b/round-000002.*.safetensors"]
)
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_damaged_message_that_is_due_is_one_line(
    message: str, damage: str, tmp_path: Path
) -> None:
    """Field case 36: it is found before anything is trained, not mixed and not blamed on the
    learning rate.
    """
    position, chain, _ = written(tmp_path)
    [path] = tmp_path.glob(message)
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:3] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(RunError, match="and the edge with b needs it; restore exchange/"):
        read(tmp_path, position, chain)


def test_a_ledger_without_hashes_is_read_as_it_is_and_chained_from_then_on(tmp_path: Path) -> None:
    """dlora 0.1.0 wrote none."""
    _, _, path = written(tmp_path)
    old = [
        {key: entry[key] for key in ("event", "round", "neighbour")}
        for entry in map(json.loads, path.read_text().splitlines())
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in old))
    ledger = read(tmp_path, 4, None)
    again = Ledger(tmp_path)
    again.record(3, "b", "dropped")
    again.close()
    assert read(tmp_path, 7, again.chain(7)).committed() == ledger.committed()
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(RunError, match="restore exchange/"):
        Ledger(tmp_path)


def test_messages_stay_until_both_checkpoints_hold_them(tmp_path: Path) -> None:
    """Field case 10: a peer that goes back one checkpoint mixes the edges since once more."""
    position, chain, _ = written(tmp_path)
    ledger = Ledger(tmp_path)
    ledger.clean(3, position)
    ledger.close()
    read(tmp_path, position, chain)
    kept = [path.name.partition(".")[0] for path in (tmp_path / "sent").iterdir()]
    assert kept == ["round-000002"]
