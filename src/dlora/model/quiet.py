"""Silences messages of libraries, before they are imported and while they load a model."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # a run sends nothing to the hub
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports an optional kernel

from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Within this context, PEFT finds no bitsandbytes, whose import takes seconds.

    When the base model is quantised, bitsandbytes is imported already, and nothing changes.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # makes an import fail
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available

        for found in (is_bnb_available, is_bnb_4bit_available):  # PEFT remembers what it found
            found.cache_clear()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within this context, transformers prints no warnings about new heads and no progress bars.

    New heads are expected here, and dlora's log reports them.
    """
    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
