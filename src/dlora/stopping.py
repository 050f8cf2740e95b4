"""How a command is stopped: by Ctrl-C, by a service's SIGTERM or by Slurm's SIGUSR1."""

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

# sent by Ctrl-C, by a service manager, and by Slurm before a job's time ends
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Screen(Protocol):
    """The display on the terminal while a command works."""

    def say(self, text: str) -> None:
        """Print a separate line."""

    def close(self) -> None:
        """Remove the display and restore the terminal."""


class Stop:
    """Remembers whether one of `SIGNALS` has arrived; the second raises KeyboardInterrupt.

    At the first signal, ``answer`` is printed. While the command is loading (until `hear` gets
    another event than "loading"), nothing is written yet, and the first signal ends the process at
    once with `os._exit`. An exception would not do it, because libraries that are being imported
    catch exceptions.
    """

    def __init__(self, answer: str, screen: Screen) -> None:
        self.loading, self.asked = True, False
        self._answer, self._screen = answer, screen

    def __call__(self) -> bool:
        """Whether the run should stop after this round."""
        return self.asked

    def hear(self, event: Mapping[str, Any]) -> None:
        """Listen to the program's events.

        After a signal, raises Interrupted while a run is scored, because scoring can be repeated.
        """
        self.loading = self.loading and event["event"] == "loading"
        if self.asked and event["event"] == "evaluating":
            raise Interrupted(f"{event['run']} stopped while it was scored")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.loading:
            with contextlib.suppress(RuntimeError):  # the signal interrupted a write
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
    """Write a line to standard error without Python's buffer.

    The signal may arrive during a write to that buffer, which does not allow a second write.
    """
    os.write(sys.stderr.fileno(), f"{text}\n".encode())


@contextmanager
def resumable(screen: Screen) -> Iterator[Stop]:
    """Within this context, the first signal lets the round finish, and the second discards it.

    The run then ends with Interrupted, whose text has the command that resumes it.
    """
    with Stop("stopping after this round; Ctrl-C again discards it", screen) as stop:
        try:
            yield stop
        except Interrupted as interrupted:
            named = Interrupted(f"{interrupted}; go on with: {_command('--resume')}")
            named.told = interrupted.told
            raise named from None
        except KeyboardInterrupt:
            what = "the round under way is discarded, what was saved stands"
            raise Interrupted(f"{what}; go on with: {_command('--resume')}") from None


def _command(*more: str) -> str:
    """The command line of this process, with ``more`` at its end."""
    if os.environ.get("WORLD_SIZE", "1") != "1":  # the launcher's own options are not known here
        return " and ".join(["the same command", *(f"{word} at its end" for word in more)])
    return shlex.join(
        ["dlora", *(argument for argument in sys.argv[1:] if argument not in more), *more]
    )
