"""Content that was changed at some places."""

from __future__ import annotations

from hypothesis import strategies as st


def mutated(data: bytes, edits: list[tuple[int, int]], cut: int | None) -> bytes:
    changed = bytearray(data)
    for place, byte in edits:
        changed[place % len(changed)] = byte
    return bytes(changed[:cut])


edits = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8)
cuts = st.none() | st.integers(0, 400)
