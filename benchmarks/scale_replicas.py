"""Replicas that are simulated under the real pool: they answer when their time is up."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from unicuco.search import SearchConfig
from unicuco.types import Ask, Evaluation, Strategy


class CurveModel:
    """Judges a strategy by the axis curves: a sum of what axes cost alone, with its derivatives.

    It takes some twenty microseconds, for what a replica does costs the driver nothing.
    """

    def __init__(self, config: SearchConfig) -> None:
        space = config.space()
        self._table = config.curves.double().numpy()  # (d, knots)
        self._span = space.span.numpy()
        self._weights = space.axis_params.numpy() / space.cost.num_site_weights
        self._axes = np.arange(space.num_axes)

    def evaluate(self, strategy: Strategy, *, wall_s: float) -> Evaluation:
        """Return the evaluation, as if it had taken ``wall_s``."""
        settings = np.array(strategy.values)
        pieces = self._table.shape[1] - 1
        place = settings / self._span * pieces  # sparsities begin at 0
        knot = np.minimum(place.astype(int), pieces - 1)
        below, above = self._table[self._axes, knot], self._table[self._axes, knot + 1]
        return Evaluation(
            strategy_key=strategy.key,
            kl=float((below + (place - knot) * (above - below)).sum()),
            kept_fraction=float(1 - self._weights @ (settings / self._span)),
            gradient=tuple(((above - below) * pieces / self._span).tolist()),
            tokens=3072,
            text_digest="curves",
            cost_units=3.0,
            wall_s=wall_s,
        )


class Clock:
    """Calls functions when they are due, from one thread."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._changed = threading.Condition()
        self._count = 0
        threading.Thread(target=self._run, daemon=True).start()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Have something called."""
        with self._changed:
            self._count += 1
            heapq.heappush(self._due, (time.perf_counter() + seconds, self._count, call))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                wait = self._due[0][0] - time.perf_counter() if self._due else None
                if wait is None or wait > 0:
                    self._changed.wait(wait)
                    continue
                _, _, call = heapq.heappop(self._due)
            call()


class Reference:
    """What stands for a reference of Ray's."""

    def __init__(self) -> None:
        self._future: Future[Any] = Future()

    def future(self) -> Future[Any]:
        """Return what it resolves to."""
        return self._future


class SleepingReplica:
    """A replica that answers when its time is up, and costs this process next to nothing."""

    capacity = 1
    ahead = 0

    def __init__(self, clock: Clock, model: CurveModel, seconds: float, times: list[float]) -> None:
        self._clock, self._model, self._seconds, self._times = clock, model, seconds, times

    def start(self) -> Reference:
        """Be ready at once."""
        reference = Reference()
        reference.future().set_result(None)
        return reference

    def evaluate(self, ask: Ask) -> Reference:
        """Begin to evaluate."""
        reference = Reference()
        self._times.append(time.perf_counter())

        def answer() -> None:
            self._times.append(time.perf_counter())
            outcome = self._model.evaluate(ask.strategy, wall_s=self._seconds)
            reference.future().set_result(outcome)

        self._clock.after(self._seconds, answer)
        return reference

    def kill(self) -> None:
        """Do nothing: it has no process."""
