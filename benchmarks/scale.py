"""How far learning scales: durable commits, the driver under 200 replicas, 1 to 256 by simulation.

``python -m benchmarks.scale [commits|driver|simulation]…``; each part's results go to
``benchmarks/results/scale_PART.json``, the simulation's plot beside them.

- ``commits``: evaluations a second that the driver's loop brings to the disk in groups and tells,
  while replicas that take no time give it as much as it takes.
- ``driver``: a real Ray learner with real surrogate fits, the real loop, store and pool; only the
  replicas are simulated: each answers from the axis curves, 0.4 s after it was asked. Idle is what
  is missing to all of them being at work from the first ask to the last outcome.
- ``simulation``: what a discrete-event simulation (`benchmarks.scale_model`) makes of seconds that
  are measured here: of an evaluation, the hand-over to a replica, its restart, a commit, a fit.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.common import RESULTS, Bench, save, table
from benchmarks.scale_model import Times, Trouble, simulate, stops_at
from benchmarks.scale_replicas import Clock, CurveModel, Reference, SleepingReplica
from cluster.actors import build_configured_search
from cluster.driver import RayBackend
from cluster.learner import RaySearch, start_learner
from cluster.local_ray import local_ray
from cluster.metrics import RayMeter
from cluster.pool import RayPool
from unicuco.evaluate import LocalEvaluator
from unicuco.search import SearchConfig
from unicuco.search.drive import Progress, drive
from unicuco.search.front import FrontSearch
from unicuco.store import EvaluationStore
from unicuco.types import Ask, Evaluation, Outcome, Strategy

_REPLICAS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ROUNDS = (3, 64, 512)
_QUIET_PERCENT = 10.0  # of all cores
_TROUBLE = {
    "nothing goes wrong": Trouble(),
    "1 in 20 takes 5 times as long": Trouble(straggling=0.05),
    "1 in 50 kills its replica": Trouble(deadly=0.02),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description="Measure how far learning scales.")
    parser.add_argument("parts", nargs="*", help=f"Out of {', '.join(_PARTS)}; all if left out.")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--replicas", type=int, default=200, help="Simulated, of the driver.")
    parser.add_argument("--seconds", type=float, default=0.4, help="Of their evaluations.")
    parser.add_argument("--evaluations", type=int, default=4000)
    parser.add_argument("--round-size", type=int, default=1250, help="Of the driver's search.")
    values = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bench = Bench(values.model, test_tokens=512)
    for part in values.parts or _PARTS:
        document = _PARTS[part](bench, values)
        print("saved to", save(f"scale_{part}", {"model": values.model, **document}))


def _commits(bench: Bench, values: argparse.Namespace) -> dict[str, object]:
    """Drive replicas that take no time; nothing but the loop, the pool and the disk is at work."""
    config = replace(bench.prepared.search, round_size=256)
    model = CurveModel(config)
    space = config.space()
    low, high = config.sparsity_range
    count = values.evaluations
    strategies = [space.uniform(low + (high - low) * k / count) for k in range(count)]
    known = {one.key: model.evaluate(one, wall_s=0.01) for one in strategies}

    def pool(number: int) -> RayPool:
        return RayPool(lambda: _Ready(known), number)

    rates = {}
    for replicas in (1, 16, 200):
        seconds = _driven(_Fixed(strategies, 256), pool(replicas), count)
        rates[f"evaluations a second, {replicas} replicas"] = count / seconds
    print(table(["what", "figure"], list(rates.items())))
    return {"figures": rates, "evaluations": count}


class _Ready(SleepingReplica):
    """A replica that knows all answers."""

    def __init__(self, known: dict[str, Evaluation]) -> None:
        self._known = known

    def evaluate(self, ask: Ask) -> Reference:
        reference = Reference()
        reference.future().set_result(self._known[ask.strategy.key])
        return reference


class _Fixed:
    """Asks given strategies."""

    def __init__(self, strategies: Sequence[Strategy], round_size: int) -> None:
        self.round_size = round_size
        self._strategies = strategies

    def ask(self, round: int) -> list[Ask]:
        first = round * self.round_size
        return [
            Ask(round=round, position=k, strategy=strategy, derivatives=True)
            for k, strategy in enumerate(self._strategies[first : first + self.round_size])
        ]

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        pass


def _driven(search: Any, pool: RayPool, count: int) -> float:
    """Drive to the end with a store on the disk; return the seconds."""
    with _store() as store:
        started = time.perf_counter()
        drive(search, pool, store, num_evaluations=count, on_progress=_ignore)
        seconds = time.perf_counter() - started
        assert sum(1 for _ in store.read()) == count
    pool.close()
    return seconds


@contextmanager
def _store() -> Iterator[EvaluationStore]:
    """Open a store on this folder's disk; /tmp may be memory."""
    with (
        tempfile.TemporaryDirectory(dir=Path.cwd()) as folder,
        EvaluationStore.open(Path(folder) / "evaluations.db", create=True) as store,
    ):
        store.acquire_lease("benchmark")
        yield store


def _ignore(progress: Progress) -> None:
    pass


def _driver(bench: Bench, values: argparse.Namespace) -> dict[str, object]:
    """Drive sleeping replicas by a real learner."""
    config = replace(bench.prepared.search, round_size=values.round_size)
    model, clock = CurveModel(config), Clock()
    times: list[float] = []  # of every ask that a replica gets and answers
    with local_ray(array_bytes=2**20):
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        start = partial(start_learner, build_configured_search, config, runtime_env=environment)
        meter = RayMeter()
        learner = RaySearch(start, meter)
        pool = RayPool(
            lambda: SleepingReplica(clock, model, values.seconds, times),
            values.replicas,
            meter=meter,
        )
        _settle()
        _driven(learner, pool, values.evaluations)
        learner.close()
    seconds = max(times) - min(times)
    busy = values.evaluations * values.seconds / (values.replicas * seconds)
    figures = {
        "replicas": values.replicas,
        "seconds of an evaluation": values.seconds,
        "evaluations": values.evaluations,
        "evaluations in a round": values.round_size,
        "seconds from the first ask to the last outcome": seconds,
        "evaluations a second": values.evaluations / seconds,
        "share of replicas' time that they idle": 1 - busy,
    }
    print(table(["what", "figure"], list(figures.items())))
    return {"figures": figures}


def _settle(wait_s: float = 30.0) -> None:
    """Wait until a Ray that was just started does not take this machine's cores any more."""
    deadline = time.monotonic() + wait_s
    while psutil.cpu_percent(interval=1.0) > _QUIET_PERCENT and time.monotonic() < deadline:
        pass


def measure_times(bench: Bench) -> Times:
    """Measure on this machine, one thread, what the simulation is made of."""
    restart_s, hand_over_s, evaluation_s = _measure_replica(bench)
    commit_s, row_s = _measure_commits(bench)
    return Times(
        evaluation_s=evaluation_s,
        hand_over_s=hand_over_s,
        restart_s=restart_s,
        commit_s=commit_s,
        row_s=row_s,
        fits=_measure_fits(bench.prepared.search),
    )


def _measure_replica(bench: Bench, count: int = 6) -> tuple[float, float, float]:
    """Return seconds of a start, of a hand-over, and of an evaluation with derivatives."""
    local = LocalEvaluator(bench.prepared.evaluator, bench.search_arrays)
    strategies = [bench.space.uniform(0.3 + 0.4 * k / count) for k in range(count)]
    asks = [
        Ask(round=0, position=k, strategy=s, derivatives=True) for k, s in enumerate(strategies)
    ]
    with RayBackend() as backend:
        pool = backend.start_pool(bench.prepared.evaluator, bench.search_arrays)
        started = time.perf_counter()
        pool.submit(asks[0])
        pool.next_outcome()
        restart_s = time.perf_counter() - started
        extra, evaluation = [], []
        for ask in asks:
            started = time.perf_counter()
            local.evaluate(ask.strategy, derivatives=True)
            evaluation.append(time.perf_counter() - started)
            started = time.perf_counter()
            pool.submit(ask)
            _, outcome = pool.next_outcome()
            extra.append(time.perf_counter() - started - outcome.wall_s)
    evaluation_s = statistics.median(evaluation)
    return max(0.0, restart_s - evaluation_s), statistics.median(extra), evaluation_s


def _measure_commits(bench: Bench) -> tuple[float, float]:
    """Return seconds of a durable commit and of each row in it, by least squares."""
    model = CurveModel(bench.prepared.search)
    points: list[tuple[int, float]] = []
    used = 0
    with _store() as store:
        for size in (1, 1, 1, 8, 8, 64, 64, 256, 256):
            results = []
            for number in range(used, used + size):
                strategy = bench.space.uniform(0.1 + 0.7 * number / 1000)
                ask = Ask(round=number, position=0, strategy=strategy, derivatives=True)
                results.append((ask, model.evaluate(strategy, wall_s=0.1)))
            used += size
            started = time.perf_counter()
            store.append(results)
            points.append((size, time.perf_counter() - started))
    sizes, seconds = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    slope, offset = np.polyfit(sizes, seconds, 1)
    return max(float(offset), float(seconds.min())), max(float(slope), 0.0)


def _measure_fits(config: SearchConfig) -> tuple[tuple[int, float], ...]:
    """Return seconds of an ask of a round by the number of evaluations that it sees."""
    fits = []
    model = CurveModel(config)
    for size in (6, 24, 96, 384, 1536):
        search = FrontSearch(replace(config, round_size=size))
        asks = search.ask(0)
        search.tell(0, [(ask, model.evaluate(ask.strategy, wall_s=0.1)) for ask in asks])
        search.tell(1, [])
        started = time.perf_counter()
        search.ask(2)
        fits.append((size, time.perf_counter() - started))
    return tuple(fits)


def _simulation(bench: Bench, values: argparse.Namespace) -> dict[str, object]:
    """Simulate 1 to 256 replicas from what was measured."""
    times = measure_times(bench)
    print(table(["measured seconds", "figure"], [[n, str(v)] for n, v in asdict(times).items()]))
    rows: list[list[object]] = []
    curves: dict[str, list[tuple[int, float]]] = {}
    for round_size in _ROUNDS:
        for name, trouble in _TROUBLE.items():
            results = [
                simulate(
                    replicas=replicas,
                    evaluations=values.evaluations,
                    round_size=round_size,
                    times=times,
                    trouble=trouble,
                )
                for replicas in _REPLICAS
            ]
            seconds = [(r, one.seconds) for r, one in zip(_REPLICAS, results, strict=True)]
            curves[f"rounds of {round_size}, {name}"] = seconds
            share = results[-1].learner_busy
            cells = [f"{one:.0f}" for _, one in seconds]
            rows.append([round_size, name, *cells, stops_at(seconds), share])
    header = ["round", "what goes wrong", *(f"s, {r}" for r in _REPLICAS)]
    print(table([*header, "stops at", "learner busy at 256"], rows))
    path = RESULTS / "scale_simulation.png"
    RESULTS.mkdir(exist_ok=True)
    _plot(path, curves)
    return {"evaluations": values.evaluations, "measured": asdict(times), "seconds": curves}


def _plot(path: Path, curves: dict[str, list[tuple[int, float]]]) -> None:
    """Draw seconds of learning against replicas."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    styles = itertools.product(("#d97706", "#0b6bcb", "#059669"), ("-", "--", ":"))
    for (name, points), (color, line) in zip(curves.items(), styles, strict=True):
        axes.plot(
            *zip(*points, strict=True), color=color, linestyle=line, marker="o", ms=3, label=name
        )
    first = next(iter(curves.values()))[0][1]
    axes.plot(
        _REPLICAS, [first / r for r in _REPLICAS], color="#9ca3af", label="as many times faster"
    )
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="replicas (simulated)", ylabel="seconds of learning")
    axes.grid(visible=True, color="#e5e7eb")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


_PARTS: dict[str, Callable[[Bench, argparse.Namespace], dict[str, object]]] = {
    "commits": _commits,
    "driver": _driver,
    "simulation": _simulation,
}


if __name__ == "__main__":
    main()
