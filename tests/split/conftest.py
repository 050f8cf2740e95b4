"""A device's half of a small model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dlora.split.device.half import Half
from kit.split_faults import small_half


@pytest.fixture(scope="module")
def half(model_folder: Callable[..., Path]) -> Half:
    return small_half(model_folder)
