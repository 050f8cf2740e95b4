"""A Trainer of transformers or TRL as a peer: one callback that mixes while it trains."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState

from dlora.errors import ConfigError
from dlora.programs.script import Peer
from dlora.run.script_peer import Mixed


class PeerCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # untyped bases
    """Makes a Trainer a peer: ``trainer.add_callback(dlora.PeerCallback(every_steps=20))``.

    It mixes after every ``every_steps`` optimiser steps. ``wait``: as in `Peer.mix`. For the other
    arguments see `Peer`; what is not given comes from the environment, so the same script runs at
    every site. The tokenizer is the trainer's. What it does, and when:

    - when training begins, after a checkpoint was loaded: it joins the neighbours;
    - after an optimiser step, before the trainer logs, evaluates and saves: it mixes, so a
      checkpoint holds mixed tensors and, in trainer_state.json, the rounds that are in them;
    - when a checkpoint is on disk: messages are removed that only checkpoints before the last two
      need. ``resume_from_checkpoint`` may therefore name one of the last two;
    - with what the trainer logs: ``dlora/round``, ``dlora/wait_s``, ``dlora/bytes``,
      ``dlora/neighbours`` and ``dlora/distance`` of the last round;
    - after the last round: it writes the average of all peers to ``output_dir/consensus`` and ends
      the training. ``load_best_model_at_end`` then loads the best of this site's own checkpoints
      into the trainer's model; the average is not touched by it.

    Do not touch between the beginning and the end of the training: which parameters require a
    gradient, their names and shapes. Raises ConfigError if ``every_steps`` is not positive.
    """

    def __init__(
        self,
        every_steps: int = 20,
        *,
        wait: bool | None = None,
        peers: str | Path | None = None,
        name: str | None = None,
        key: str | Path | None = None,
        federation: str | Path | None = None,
        listen: str | None = None,
        agree: Mapping[str, Any] | None = None,
    ) -> None:
        if every_steps < 1:
            raise ConfigError(f"every_steps {every_steps}: expected a number of steps, at least 1")
        self.every_steps, self.wait = every_steps, wait
        self._given: dict[str, Any] = {
            "peers": peers,
            "name": name,
            "key": key,
            "federation": federation,
            "listen": listen,
            "agree": agree,
        }
        self.peer = Peer(**self._given)
        self._joined = contextlib.ExitStack()
        # a training that ends with an error or Ctrl-C calls no hook
        atexit.register(self._joined.close)
        self._taking_part = False
        # positions of the tensors now, of the last checkpoint, and of the one before it
        self._now: dict[str, Any] | None = None
        self._saved: list[dict[str, Any]] = []
        self._told: Mixed | None = None  # the last round, for the trainer's log

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps: how this was made, and which rounds are in the tensors."""
        given = {key: _text(value) for key, value in self._given.items()}
        return {
            "args": {"every_steps": self.every_steps, "wait": self.wait, **given},
            "attributes": {"position": self._now},
        }

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        """Join the neighbours; go on from the checkpoint that the trainer has loaded."""
        _before_reports(self)
        self._joined.close()
        if state.global_step:
            self._saved = [_position(state)]
            self.peer.load_state_dict(self._saved[0])
        self.peer.tokenizer = processing_class
        self._joined.enter_context(self.peer.joined(model))
        self._taking_part = True
        self._now = self.peer.state_dict()
        rounds, due = self.peer.rounds, state.max_steps // self.every_steps
        if due < rounds:
            warnings.warn(
                f"the training has {state.max_steps} steps, which is {due} rounds of"
                f" {self.every_steps}; peers.yaml says {rounds}: the last {rounds - due} are left"
                " out",
                stacklevel=2,
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> TrainerControl:
        """Mix if it is time; after the last round write the average and end the training."""
        if self._taking_part and state.global_step % self.every_steps == 0:
            self._told = self.peer.mix(wait=self.wait) or self._told
            self._now = self.peer.state_dict()
            if not self.peer.has_rounds_left:
                self._finish(args, model)
                control.should_training_stop = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A checkpoint is on disk; the one before it may still be gone on from."""
        if self._now is not None:
            self._saved = [*self._saved, self._now][-2:]
            if len(self._saved) == 2 and self._taking_part:
                self.peer.saved(self._saved[0])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add the last round to what the trainer logs."""
        if self._told is None or logs is None:
            return
        told = {
            "dlora/round": self._told.round,
            "dlora/wait_s": self._told.wait_s,
            "dlora/bytes": self._told.num_bytes,
            "dlora/neighbours": len(self._told.neighbours),
            "dlora/distance": self._told.distance,
        }
        logs |= told
        state.log_history[-1] |= told
        self._told = None

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Leave the neighbours. If rounds are left, the average is written now."""
        if self._taking_part:
            self._finish(args, model)

    def _finish(self, args: TrainingArguments, model: Any) -> None:
        average = self.peer.average()
        self._now = self.peer.state_dict()
        folder = Path(args.output_dir, "consensus")
        with self.peer.holding(average):
            if args.should_save:
                _save(model, average, folder)
        self._taking_part = False
        self._joined.close()


def _save(model: Any, average: Mapping[str, Tensor], folder: Path) -> None:
    """Write the model, which holds the average, whole or not at all."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    # PEFT picks the adapter out of the tensors that it is given; a full model needs all
    own = model.state_dict() if not hasattr(model, "peft_config") else {}
    model.save_pretrained(unfinished, state_dict={**own, **average})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def _position(state: TrainerState) -> dict[str, Any]:
    """The position in a checkpoint's trainer_state.json. Raises ConfigError if there is none."""
    kept = state.stateful_callbacks.get(PeerCallback.__name__)
    position = kept and kept["attributes"]["position"]
    if not position:
        raise ConfigError(
            "the checkpoint was made without dlora.PeerCallback, so it does not say which rounds"
            " are in it; start without resume_from_checkpoint, in another state_dir"
        )
    found: dict[str, Any] = position
    return found


def _before_reports(callback: PeerCallback) -> None:
    """Let the callback hear logs before those that report them to TensorBoard and the like.

    Callbacks are called in the order in which they were added, and nothing hands them the list; so
    it is taken from the handler that calls.
    """
    handler = sys._getframe(2).f_locals.get("self")
    if isinstance(handler, CallbackHandler):
        others = [one for one in handler.callbacks if one is not callback]
        place = sum(isinstance(one, DefaultFlowCallback) for one in others)
        handler.callbacks = [*others[:place], callback, *others[place:]]


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
