"""Libraries are told to be quiet, before they are imported and while they load a model."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # no run of ours phones home
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of an optional kernel

from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Keep PEFT from importing bitsandbytes, which takes seconds, where no base is quantised by it:
    it is not there.

    A quantised base has imported it before, and then nothing changes.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # Python's own way to say so
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available

        for found in (is_bnb_available, is_bnb_4bit_available):  # PEFT remembers what it found
            found.cache_clear()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """transformers reports new heads and draws bars of its own; here that is expected and the log
    says it.
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
