"""One device in the cloud: its parts, each in its own thread, and the limits that it must keep."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from dlora.events.serving import DeviceEvent, DeviceOpened, DeviceRefused, PartDone, PartFailed
from dlora.split.agreement import Agreement, agree
from dlora.split.cloud.body import Body
from dlora.split.cloud.handed_off import HandedOff, HandOffs
from dlora.split.cloud.limits import PATIENCE_S, Budget, Limits, Turn
from dlora.split.cloud.part import CloudPart, through_the_cloud
from dlora.split.cloud.work import Gone, Work
from dlora.split.tensors import as_factors, bits
from dlora.wire.frame import ChannelDown, Misbehaviour
from dlora.wire.split.frames import (
    Begin,
    Drop,
    Failed,
    HandOff,
    Open,
    Opened,
    Refused,
    SplitFrame,
    Values,
    What,
    Why,
)

MAX_IDLE_FRAMES = 1000  # frames in a row that change nothing, between two parts that end well


class Session:
    """What the cloud knows of one device while its link lasts. Nothing of it is kept afterwards.

    ``hear`` takes each frame of the device in order and never waits. ``send`` is called from
    threads of the session, may wait, and raises ChannelDown when the link has ended. ``tell``
    hears each event, from any thread; it hears ``opened`` before the device does.

    It is one class because one lock guards all of its state.
    """

    def __init__(
        self,
        device: str,
        body: Body,
        limits: Limits,
        budget: Budget,
        send: Callable[[SplitFrame], None],
        tell: Callable[[DeviceEvent], None] = lambda event: None,
    ) -> None:
        self.device, self.body, self.limits, self.budget = device, body, limits, budget
        self._send, self._tell = send, tell
        # Called with the devices that hold more than their share of the memory; the program sets
        # it.
        self.evict_others: Callable[[set[str]], object] = lambda greedy: None
        self.agreement: Agreement | None = None  # set when the device has sent Open
        self._handed_off = HandOffs(device, budget)
        self._work: dict[tuple[int, int], Work] = {}
        self._lock, self._closed = threading.Lock(), False
        self._answers = 0  # answers that wait to be sent
        self._idle_frames = 0  # frames that changed nothing since a part last ended well
        self._threads = ThreadPoolExecutor(
            limits.max_parts + 1, thread_name_prefix=f"part-{device}"
        )

    def hear(self, frame: SplitFrame) -> None:
        """Take one frame. Raises Misbehaviour (a ValueError) for a frame that no correct device
        sends here; the caller then ends the link.
        """
        if isinstance(frame, Open):
            if self.agreement is not None:
                raise Misbehaviour("Open on a link that is open already")
            self._later(self._open(frame.manifest))
        elif self.agreement is None:
            raise Misbehaviour(f"{type(frame).__name__} before Open")
        elif isinstance(frame, Begin):
            refusal = self._begin(frame, self.agreement)
            if refusal is not None:
                self._later(refusal)
        elif isinstance(frame, HandOff):
            self._keep(frame, self.agreement)
        elif isinstance(frame, Drop):
            with self._lock:
                dropped = [self._work.pop(key) for key in [*self._work] if key[0] == frame.call]
            for work in dropped:
                work.end()
            if not dropped:
                self._changes_nothing(frame)
        elif isinstance(frame, Values) and frame.what in (
            "update",
            "hidden-gradient",
            "input-gradient",
        ):
            waiting = self._work.get((frame.call, frame.part))
            # otherwise the part failed here while this frame was on its way
            if waiting is not None:
                waiting.put(frame)
            else:
                self._changes_nothing(frame)
        else:
            raise Misbehaviour(f"{type(frame).__name__} from a device")

    def _changes_nothing(self, frame: SplitFrame) -> None:
        self._idle_frames += 1
        if self._idle_frames > MAX_IDLE_FRAMES:
            raise Misbehaviour(
                f"{MAX_IDLE_FRAMES} frames that change nothing, the last a {type(frame).__name__}"
            )

    def evict(self) -> None:
        """Give up the parts that have waited too long for this device, because another device waits
        for its share of the memory.
        """
        with self._lock:
            slow = [work for work in self._work.values() if work.has_waited_s > PATIENCE_S]
        for work in slow:
            work.evicted = True
            work.end()

    def close(self) -> None:
        """End all parts; each thread ends as soon as it next waits for a frame."""
        with self._lock:
            self._closed, works = True, [*self._work.values()]
            self._handed_off.clear()
        for work in works:
            work.end()
        self._threads.shutdown(wait=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of the parts that are in the cloud now."""
        with self._lock:
            return sum(len(work.begin.embedded) for work in self._work.values())

    @property
    def num_parts(self) -> int:
        """Parts that are in the cloud now."""
        return len(self._work)

    # Opening

    def _open(self, manifest: str) -> SplitFrame:
        agreed = agree(manifest, self.body.facts, self.body.units, self.body.directions)
        if isinstance(agreed, str):
            self._tell(DeviceRefused(event="refused", device=self.device, reason=agreed))
            return Refused(agreed)
        self.agreement = agreed
        self._tell(
            DeviceOpened(
                event="opened", device=self.device, wire=agreed.wire, groups=len(agreed.units)
            )
        )
        return Opened(self.limits.max_tokens, self.limits.max_parts)

    # Parts

    def _keep(self, frame: HandOff, agreement: Agreement) -> None:
        """Store the factors of a killed unit for later parts."""
        if frame.unit >= len(agreement.units):
            raise Misbehaviour(f"a hand-off of unit {frame.unit} of {len(agreement.units)}")
        unit = agreement.units[frame.unit]
        factors = as_factors(frame.tensor.to(self.body.device), unit, agreement)
        if factors is None:
            raise Misbehaviour(
                f"a hand-off of {frame.tensor.numel()} numbers for unit {frame.unit}"
            )
        with self._lock:
            if not self._closed:
                self._handed_off.keep(frame.unit, HandedOff(frame.version, factors))

    def _begin(self, begin: Begin, agreement: Agreement) -> SplitFrame | None:
        width, key = self.body.facts["embedding_width"], (begin.call, begin.part)
        if begin.embedded.shape[1] != width:
            raise Misbehaviour(
                f"embedded tokens of width {begin.embedded.shape[1]}; the body takes {width}"
            )
        tokens = len(begin.embedded)
        if (
            not bits(begin.mask, begin.rows * begin.columns)
            .reshape(begin.rows, begin.columns)
            .any(axis=1)
            .all()
        ):
            # such a row costs memory, and the limit on tokens does not count it
            raise Misbehaviour("a row without any token")
        with self._lock:
            if self._closed:
                return None
            if key in self._work:
                raise Misbehaviour(f"part {key[1]} of call {key[0]} was begun already")
            held = sum(len(work.begin.embedded) for work in self._work.values())
            if tokens + held > self.limits.max_tokens or len(self._work) >= self.limits.max_parts:
                return self._failed(
                    begin,
                    "tokens",
                    f"{held} tokens are here and {tokens} more came; {self.limits.max_tokens} is"
                    " the limit",
                )
            handed_off = self._handed_off.named(begin, len(agreement.units))
            if handed_off is None:
                return self._failed(begin, "memory", "what was handed off found no room here")
            if (why := self.body.cannot(begin)) is not None:
                return self._failed(begin, "broken", why)
            drops = begin.seed is not None and agreement.dropout != 0.0
            need_bytes = begin.rows * self.body.memory(begin.columns, drops)
            taken = self.budget.take(self.device, need_bytes)
            if taken is False:
                why = ", its attention written out for dropout" if drops else ""
                padded = begin.rows * begin.columns
                needed = (
                    f"{need_bytes / 1e6:.3g} MB are needed for {padded} tokens in rows of"
                    f" {begin.columns}{why}"
                )
                total, free = (
                    f"{num_bytes / 1e6:.3g} MB"
                    for num_bytes in (self.budget.num_bytes, self.budget.free_bytes)
                )
                return self._failed(
                    begin, "memory", f"{needed}; limits.memory_bytes is {total}, {free} are free"
                )
            for kept in handed_off.values():
                kept.users += 1
            work = self._work[key] = Work(begin, self.limits.idle_s)
            self._threads.submit(self._run, work, agreement, handed_off, need_bytes, taken is None)
        return None

    def _run(
        self,
        work: Work,
        agreement: Agreement,
        handed_off: dict[int, HandedOff],
        need_bytes: int,
        waits: bool,
    ) -> None:
        """Run one part in its own thread; ``waits``: it must first wait for memory."""
        if waits and not self.budget.wait(
            self.device, need_bytes, self.limits.idle_s, self.evict_others
        ):
            need_bytes = 0
        with self.budget.turns.part(self.device) as turn:
            self._live(work, agreement, handed_off, need_bytes, turn)

    def _live(
        self,
        work: Work,
        agreement: Agreement,
        handed_off: dict[int, HandedOff],
        held_bytes: int,
        turn: Turn,
    ) -> None:
        """Run a part and send its last frame; ``held_bytes`` is 0 if it got no memory."""
        began_at, begin = time.monotonic(), work.begin
        answer: SplitFrame | None = None
        part: CloudPart | None = None
        try:
            factors = {number: kept.factors for number, kept in handed_off.items()}
            if not held_bytes:
                raise MemoryError

            def say(frame: SplitFrame) -> None:
                with turn.away():
                    self._send(frame)

            def hear(what: What, unit: int, shape: tuple[int, int]) -> Tensor:
                with turn.away():
                    return work.hear(what, unit, shape)

            turn.begin()
            part = CloudPart(
                begin, agreement, self.body.directions, factors, self.body.device, say, hear
            )
            answer = through_the_cloud(
                part, lambda part: self.body.forward(part, agreement.dropout)
            )
            self._tell(
                PartDone(
                    event="part",
                    device=self.device,
                    tokens=len(begin.embedded),
                    keep=begin.keep,
                    waited_s=work.waited_s,
                    seconds=time.monotonic() - began_at,
                )
            )
            self._idle_frames = 0
        except Gone:
            if work.evicted:
                answer = self._failed(
                    begin, "expired", "another device waited for its share of the cloud's memory"
                )
        except ChannelDown:
            pass
        except TimeoutError as error:
            answer = self._failed(begin, "expired", f"the device was silent: {error}")
        # an error in one part must not end the others; the device is told what it was
        except Exception as error:
            answer = self._failed(begin, *_explained(error))
        finally:
            if part is not None:
                part.forget()  # the graph must be freed before its memory is given back
            part = None
            turn.end()
            with self._lock:
                if self._work.get((begin.call, begin.part)) is work:
                    del self._work[begin.call, begin.part]
                self._handed_off.unused(handed_off.values())
            if held_bytes:
                self.budget.give_back(self.device, held_bytes)
        if answer is not None:
            self._answer(answer)

    def _later(self, frame: SplitFrame) -> None:
        """Send from another thread, because sending may wait. After `close` nothing is sent."""
        with self._lock:
            if self._answers > self.limits.max_parts:
                raise Misbehaviour(f"more than {self._answers} answers are waiting to be taken")
            if not self._closed:
                self._answers += 1
                self._threads.submit(self._answer_later, frame)

    def _answer_later(self, frame: SplitFrame) -> None:
        self._answer(frame)
        with self._lock:
            self._answers -= 1

    def _answer(self, frame: SplitFrame) -> None:
        with contextlib.suppress(ChannelDown):
            self._send(frame)

    def _failed(self, begin: Begin, why: Why, text: str) -> Failed:
        self._tell(PartFailed(event="failed", device=self.device, why=why, text=text))
        return Failed(begin.call, begin.part, why, text[:1000])


def _explained(error: Exception) -> tuple[Why, str]:
    """The reason code and one line of text for the device."""
    text = ascii((str(error).splitlines() or [""])[0][:300])[1:-1]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text:
        return "memory", "the cloud ran out of memory"
    return "broken", f"{type(error).__name__}: {text}"
