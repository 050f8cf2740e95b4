"""TRL's trainers take the callback: preferences, in bfloat16, on a real small model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dlora.programs.local import local
from kit import dpo_script


@pytest.mark.slow
@pytest.mark.skipif("DLORA_ASSETS" not in os.environ, reason="needs DLORA_ASSETS")
def test_dpo_at_two_sites_ends_with_one_average(tmp_path: Path) -> None:
    said: list[str] = []
    told = local(dpo_script.__file__, [str(tmp_path)], peers=2, rounds=4, say=said.append)
    assert {one["exit_code"] for one in told["peers"].values()} == {0}, "\n".join(said)[-3000:]
    assert all(one["edges"] == 4 for one in told["peers"].values())
    one, other = (
        (tmp_path / str(index) / "consensus" / "adapter_model.safetensors").read_bytes()
        for index in range(2)
    )
    assert one == other
