"""How the wish to stop reaches a command: Ctrl-C, SIGTERM of a service, SIGUSR1 of Slurm."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from dlora.errors import Interrupted

# of people, of services, of Slurm before a job's end
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Screen(Protocol):
    """What draws on the terminal while a command works."""

    def say(self, text: str) -> None:
        """Print a line of its own."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class Stop:
    """Whether the first of these signals has come, to which ``answer`` is said. The second is a
    KeyboardInterrupt.

    While a command loads, which it does until `hear` hears something else than "loading", the first
    ends the process at once: nothing is written yet. No exception does that, for libraries that are
    being imported swallow exceptions.
    """

    def __init__(self, answer: str, screen: Screen) -> None:
        self.loading, self.asked = True, False
        self._answer, self._screen = answer, screen

    def __call__(self) -> bool:
        """What the programs ask."""
        return self.asked

    def hear(self, event: Mapping[str, Any]) -> None:
        """A listener of the program's events. Raises Interrupted while a run is scored: that can be
        done again.
        """
        self.loading = self.loading and event["event"] == "loading"
        if self.asked and event["event"] == "evaluating":
            raise Interrupted(f"{event['run']} stopped while it was scored")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.loading:
            with contextlib.suppress(RuntimeError):  # of a write that the signal has interrupted
                self._screen.close()
            again = (
                f"stopped before it began; nothing was written; start it again with: {_command()}"
            )
            _write(again)
            os._exit(Interrupted.exit_code)
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        try:
            self._screen.say(self._answer)
        except RuntimeError:
            _write(self._answer)

    def __enter__(self) -> Stop:
        self._before = [signal.signal(number, self._interrupt) for number in SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)


def _write(text: str) -> None:
    """A line on standard error, past Python's buffer: a signal may come while that is written, and
    it cannot be entered twice.
    """
    os.write(sys.stderr.fileno(), f"{text}\n".encode())


@contextmanager
def resumable(screen: Screen) -> Iterator[Stop]:
    """The first signal lets the round finish and saves; the second gives it up. Either way: how to
    go on.
    """
    with Stop("stopping after this round; Ctrl-C again discards it", screen) as stop:
        try:
            yield stop
        except Interrupted as interrupted:
            raise Interrupted(f"{interrupted}; go on with: {_command('--resume')}") from None
        except KeyboardInterrupt:
            what = "the round under way is discarded, what was saved stands"
            raise Interrupted(f"{what}; go on with: {_command('--resume')}") from None


def _command(*more: str) -> str:
    """The command line of this process, with ``more`` at its end."""
    return shlex.join(
        ["dlora", *(argument for argument in sys.argv[1:] if argument not in more), *more]
    )
