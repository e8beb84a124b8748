"""Which request runs on which engine, and when an engine is switched: decisions only.

An engine serves one variant at a time. Requests of one variant are started together on the engine
that serves it; an engine that has nothing left to do goes to the variant whose request has waited
longest. A variant that has waited for ``patience_s`` without an engine claims one: that engine
starts nothing more of its own variant, and is switched when what runs on it has ended. So engines
do not thrash, and with v variants waiting on e engines none waits longer than ``patience_s`` plus
⌈v / e⌉ times the longest request and a switch.

Engines start when a variant has nowhere to go, or no room, and stop after ``idle_stop_s`` with
nothing to do, as long as more than ``min_engines`` run. A variant of another family than an
engine's can't be switched to in place: it is loaded anew, which takes as long as a start. So it
gets an engine of its own while there is one that does not run, else the one idle for longest.

Time comes in with every call, so everything here is tested without a clock. What this module does
not know: Ray, vLLM, texts, asyncio. A variant is any string that names contents, not a place.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

_MEMORY: Final = 0.9  # of the running mean of how long requests take
_LONGEST_RETRY_S: Final = 60


class QueueFullError(Exception):
    """No more can wait; ``retry_after_s`` is when trying again makes sense."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many requests wait for an engine; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """One request that wants an engine.

    ``family`` is what variants share that can be switched in place (masks of one base model do, a
    variant of other shapes or types shares it with none); ``size`` is how many sequences it runs at
    once; ``tries`` how many engines it has lost.
    """

    number: int
    variant: str
    family: str = ""
    arrived_s: float
    size: int = 1
    tries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Run a ticket on an engine, which serves its variant."""

    ticket: Ticket
    engine: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """Bring an engine, on which nothing runs, to a variant; it may not even have a process yet."""

    engine: int
    variant: str
    family: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """End the process of an engine, on which nothing runs."""

    engine: int


Action = Start | Switch | Stop


@dataclass(slots=True, kw_only=True)
class _Engine:
    """``variant`` is none without a process; ``going_to`` is set in a switch.

    ``is_loading``: the switch is none in place. ``idle_since_s``: when it last had something to do.
    """

    number: int
    variant: str | None = None
    family: str = ""
    going_to: str | None = None
    is_loading: bool = False
    claimed_by: str | None = None
    turn_began_s: float = -math.inf
    idle_since_s: float = math.inf
    is_stopping: bool = False
    running: dict[int, tuple[Ticket, float]] = field(default_factory=dict)

    @property
    def load(self) -> int:
        """Sequences that run."""
        return sum(ticket.size for ticket, _ in self.running.values())

    @property
    def is_idle(self) -> bool:
        """Whether it could be switched now."""
        return self.going_to is None and not self.running and not self.is_stopping

    @property
    def has_process(self) -> bool:
        """Whether it runs, or is being started."""
        return self.variant is not None or self.going_to is not None

    def is_of(self, family: str) -> bool:
        """Whether it can be switched to that family's variants in place."""
        return self.variant is not None and self.family == family


class Scheduler:
    """The state of a fleet and what to do next.

    Args:
        num_engines: engines, numbered from 0.
        slots: sequences at once on one engine; a larger request runs alone.
        max_queued: sequences that may wait.
        patience_s: see the module.
        min_engines: that are not stopped.
        idle_stop_s: see the module.
    """

    def __init__(
        self,
        *,
        num_engines: int,
        slots: int,
        max_queued: int,
        patience_s: float,
        min_engines: int = 0,
        idle_stop_s: float = math.inf,
    ) -> None:
        self._engines = [_Engine(number=number) for number in range(num_engines)]
        self._min_engines = min_engines
        self._idle_stop_s = idle_stop_s
        self._slots = slots
        self._max_queued = max_queued
        self._patience_s = patience_s
        self._waiting: dict[str, deque[Ticket]] = {}
        self._mean_s = 1.0

    @property
    def num_queued(self) -> int:
        """Sequences that wait."""
        return sum(ticket.size for tickets in self._waiting.values() for ticket in tickets)

    @property
    def num_running(self) -> int:
        """Sequences that run."""
        return sum(engine.load for engine in self._engines)

    def variant_of(self, engine: int) -> str | None:
        """Return what an engine serves, none while it is switched or has no process."""
        state = self._engines[engine]
        return None if state.going_to is not None else state.variant

    def is_switching(self, engine: int) -> bool:
        """Say whether an engine is being switched or started."""
        return self._engines[engine].going_to is not None

    def load_of(self, engine: int) -> int:
        """Return how many sequences run on an engine."""
        return self._engines[engine].load

    def submit(self, ticket: Ticket) -> None:
        """Let a request wait for its turn.

        Raises:
            QueueFullError: too many wait already.
        """
        if self.num_queued + ticket.size > self._max_queued:
            rounds = self.num_queued / (self._slots * len(self._engines))
            wait_s = min(max(self._mean_s * rounds, 1), _LONGEST_RETRY_S)
            raise QueueFullError(math.ceil(wait_s))
        self._waiting.setdefault(ticket.variant, deque()).append(ticket)

    def resubmit(self, ticket: Ticket) -> None:
        """Put a request that lost its engine back to the front; it was accepted once already."""
        self._waiting.setdefault(ticket.variant, deque()).appendleft(ticket)

    def withdraw(self, number: int) -> None:
        """Forget a request that waits; nothing happens to one that does not."""
        for tickets in self._waiting.values():
            for ticket in tickets:
                if ticket.number == number:
                    tickets.remove(ticket)
                    self._tidy()
                    return

    def withdraw_variant(self, variant: str) -> list[Ticket]:
        """Forget all that wait for a variant, which can't be served, and return them."""
        return list(self._waiting.pop(variant, ()))

    def finished(self, number: int, now_s: float) -> None:
        """Note that a request no longer runs, whatever became of it."""
        for engine in self._engines:
            if number in engine.running:
                _, began_s = engine.running.pop(number)
                engine.idle_since_s = now_s
                self._mean_s = _MEMORY * self._mean_s + (1 - _MEMORY) * (now_s - began_s)

    def switched(self, engine: int, variant: str | None, family: str, now_s: float) -> None:
        """Note what an engine serves after a switch; none: it has no process any more."""
        state = self._engines[engine]
        state.variant, state.going_to, state.claimed_by = variant, None, None
        state.family = state.family if variant is None else family
        state.turn_began_s = state.idle_since_s = now_s

    def stopped(self, engine: int) -> None:
        """Note that the process of an engine has ended as it was asked to."""
        self._engines[engine].is_stopping = False

    def lost(self, engine: int) -> None:
        """Note that an engine's process is gone. Its requests are ended by whoever ran them."""
        state = self._engines[engine]
        state.variant = state.claimed_by = None

    def warm(self, engine: int, variant: str, family: str) -> list[Switch]:
        """Bring an engine without a process, which nobody has claimed, to a variant."""
        state = self._engines[engine]
        if state.variant is not None or not state.is_idle:
            return []
        state.going_to, state.is_loading = variant, True
        return [Switch(engine=engine, variant=variant, family=family)]

    def next(self, now_s: float) -> list[Action]:
        """Decide what to do now; what is returned counts as begun."""
        self._release_claims()
        actions: list[Action] = list(self._starts(now_s))
        for variant in self._unserved():
            engine = self._free_engine(variant)
            if engine is not None:
                actions.append(self._switch(engine, variant))
            elif self._is_starved(variant, now_s):
                self._claim(variant)
        for variant in self._crowded():
            engine = self._free_engine(variant)
            if engine is not None:
                actions.append(self._switch(engine, variant))
        return [*actions, *self._stops(now_s)]

    def wake_at_s(self, now_s: float) -> float | None:
        """Return when `next` will have something to do by the passing of time alone, or none."""
        claimed = {engine.claimed_by for engine in self._engines}
        times = [
            self._waiting[variant][0].arrived_s + self._patience_s
            for variant in self._unserved()
            if variant not in claimed
        ]
        times += [engine.idle_since_s + self._idle_stop_s for engine in self._stoppable()]
        return min((time for time in times if now_s < time < math.inf), default=None)

    def _starts(self, now_s: float) -> Iterable[Start]:
        for engine in sorted(self._engines, key=lambda engine: engine.load):
            if engine.going_to is not None or engine.claimed_by is not None:
                continue
            tickets = self._waiting.get(engine.variant or "", deque())
            while tickets and self._fits(engine, tickets[0]):
                ticket = tickets.popleft()
                engine.running[ticket.number] = (ticket, now_s)
                yield Start(ticket=ticket, engine=engine.number)
        self._tidy()

    def _stops(self, now_s: float) -> Iterable[Stop]:
        for engine in self._stoppable():
            if now_s >= engine.idle_since_s + self._idle_stop_s:
                engine.variant, engine.is_stopping = None, True
                yield Stop(engine=engine.number)

    def _stoppable(self) -> list[_Engine]:
        """Idle engines beyond those that always run, the one idle for longest first."""
        spare = sum(engine.has_process for engine in self._engines) - self._min_engines
        idle = [e for e in self._engines if e.is_idle and e.has_process and e.claimed_by is None]
        return sorted(idle, key=lambda engine: engine.idle_since_s)[: max(0, spare)]

    def _fits(self, engine: _Engine, ticket: Ticket) -> bool:
        return not engine.running or engine.load + ticket.size <= self._slots

    def _tidy(self) -> None:
        self._waiting = {variant: tickets for variant, tickets in self._waiting.items() if tickets}

    def _unserved(self) -> list[str]:
        """Variants that wait and that no engine serves or will serve shortly, oldest first."""
        shortly = {
            variant
            for engine in self._engines
            for variant in (self._served(engine), self._switched_to(engine))
            if variant is not None
        }
        waiting = [variant for variant in self._waiting if variant not in shortly]
        return sorted(waiting, key=lambda variant: self._waiting[variant][0].arrived_s)

    def _crowded(self) -> list[str]:
        """Variants that wait because every engine that serves them is full; a second may help."""
        going = {engine.going_to for engine in self._engines}
        served = {self._served(engine) for engine in self._engines}
        return [variant for variant in self._waiting if variant in served and variant not in going]

    def _switch(self, engine: _Engine, variant: str) -> Switch:
        family = self._waiting[variant][0].family
        engine.is_loading = not engine.is_of(family)
        engine.going_to, engine.claimed_by = variant, None
        return Switch(engine=engine.number, variant=variant, family=family)

    @staticmethod
    def _served(engine: _Engine) -> str | None:
        """What it starts: nothing while it is switched or claimed."""
        free = engine.going_to is None and engine.claimed_by is None
        return engine.variant if free else None

    @staticmethod
    def _switched_to(engine: _Engine) -> str | None:
        """Where an engine is going in place; one that is only loading takes too long to count.

        It still takes part, once it is there.
        """
        return None if engine.is_loading else engine.going_to

    def _release_claims(self) -> None:
        """Drop the claims of variants whose requests were withdrawn or found another engine."""
        for engine in self._engines:
            if engine.claimed_by is not None and engine.claimed_by not in self._waiting:
                engine.claimed_by = None

    def _free_engine(self, variant: str) -> _Engine | None:
        """An engine to switch now: its own claim, then what costs least.

        One load is enough: a variant for which an engine is loading waits for it, or for one to
        become free that is switched in place.
        """
        family = self._waiting[variant][0].family
        idle = [engine for engine in self._engines if engine.is_idle]
        for engine in idle:
            if engine.claimed_by == variant:
                return engine
        free = [engine for engine in idle if engine.claimed_by is None]
        if any(engine.going_to == variant for engine in self._engines):
            free = [engine for engine in free if engine.is_of(family)]
        return min(free, key=lambda engine: self._cost(engine, variant), default=None)

    def _cost(self, engine: _Engine, variant: str) -> tuple[bool, bool, float]:
        """What a switch costs: a load, then what the engine had loaded, then somebody's turn."""
        is_switched_in_place = engine.is_of(self._waiting[variant][0].family)
        return not is_switched_in_place, engine.variant is not None, engine.turn_began_s

    def _is_starved(self, variant: str, now_s: float) -> bool:
        has_claim = any(engine.claimed_by == variant for engine in self._engines)
        since_s = self._waiting[variant][0].arrived_s
        return not has_claim and now_s >= since_s + self._patience_s

    def _claim(self, variant: str) -> None:
        """Let a starved variant claim the engine that has been with its own for longest."""
        busy = [
            engine
            for engine in self._engines
            if engine.running and engine.going_to is None and engine.claimed_by is None
        ]
        if busy:
            min(busy, key=lambda engine: self._cost(engine, variant)).claimed_by = variant
