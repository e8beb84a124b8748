"""How fast is it: plans, cutting, Ray replicas. Ratios within one run; medians.

``python -m benchmarks.speed``; results go to ``benchmarks/results/speed.json``. Plans and cutting
use a small run that is learned first (their time does not depend on how well it learned).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Bench, save, table
from cluster.actors import Arrays
from cluster.driver import RayBackend
from cluster.pool import RayPool
from unicuco.errors import UnicucoError
from unicuco.evaluate import LocalEvaluator
from unicuco.pipeline import LearnOptions, LocalBackend, Run, learn, prune
from unicuco.search.drive import outcome_of
from unicuco.types import Ask, Evaluation, Request, Strategy, Target

_REPEATS = 15
_EVALUATIONS = 16  # of a replica measurement
_SLEEP_S = 0.05


def mixed_requests() -> list[Request]:
    """Return 64 requests of every kind a run of masks answers."""
    requests = [Request(target=Target.SPARSITY, value=0.1 + 0.01 * k) for k in range(16)]
    requests += [Request(target=Target.MAX_KL, value=0.02 * (k + 1)) for k in range(16)]
    requests += [Request(target=Target.PREFERENCE, value=k / 16) for k in range(16)]
    return requests + [
        Request(target=Target.MAX_PARAMS, value=6_500_000 - 250_000 * k) for k in range(16)
    ]


def median_s(work: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Return the median seconds of a call, the first one left out."""
    return statistics.median([wall_s(work) for _ in range(repeats + 1)][1:])


def measure_plans(run: Run) -> dict[str, float]:
    """Time 64 plans in this warm process."""
    requests = mixed_requests()
    failed = [answer for answer in run.plan(requests) if isinstance(answer, UnicucoError)]
    assert not failed, f"all 64 can be met: {failed}"
    return {"plans_64_ms": 1000 * median_s(lambda: run.plan(requests))}


def measure_cutting(run: Run, folder: Path) -> dict[str, float]:
    """Time cutting and writing a variant against copying its files, in turn.

    Three copies: plain; synced, as variants are; synced and hashed, as variants are too.
    """
    request = Request(target=Target.SPARSITY, value=0.6)
    variant = folder / "variant"
    prune(run, request, variant)
    works: dict[str, Callable[[Path], object]] = {
        "cut": lambda target: prune(run, request, target),
        "copy": lambda target: shutil.copytree(variant, target),
        "synced_copy": lambda target: _copy(variant, target, hashed=False),
        "hashed_copy": lambda target: _copy(variant, target, hashed=True),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(_REPEATS):
        for name, work in works.items():
            target = folder / f"{name}{number}"
            times[name].append(wall_s(partial(work, target)))
            shutil.rmtree(target)
    medians = {name: statistics.median(values) for name, values in times.items()}
    figures = {f"{name}_ms": 1000 * seconds for name, seconds in medians.items()}
    ratios = {f"cut_per_{name}": medians["cut"] / medians[name] for name in list(works)[1:]}
    return figures | ratios


def _copy(source: Path, target: Path, *, hashed: bool) -> None:
    shutil.copytree(source, target)
    for path in target.iterdir():
        with path.open("rb") as file:
            if hashed:
                hashlib.file_digest(file, "sha256")
            os.fsync(file.fileno())


def wall_s(work: Callable[[], object]) -> float:
    """Return the wall seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def pool_s(pool: RayPool, asks: Sequence[Ask]) -> float:
    """Return the wall seconds in which a pool evaluates asks."""
    started = time.perf_counter()
    for ask in asks:
        pool.submit(ask)
    for _ in asks:
        pool.next_outcome()
    return time.perf_counter() - started


def _asks(bench: Bench) -> list[Ask]:
    strategies = [bench.space.uniform(0.3 + 0.4 * k / _EVALUATIONS) for k in range(_EVALUATIONS)]
    return [
        Ask(round=0, position=k, strategy=strategy, derivatives=False)
        for k, strategy in enumerate(strategies)
    ]


def measure_replicas(bench: Bench, pairs: int) -> dict[str, float]:
    """Time the same evaluations in-process, on one Ray replica and on two, interleaved.

    One thread each. Both pools stay up, idle ones cost nothing.
    """
    asks = _asks(bench)
    torch.set_num_threads(1)
    local = LocalEvaluator(bench.prepared.evaluator, bench.search_arrays)
    ratios: list[float] = []
    overheads: list[float] = []
    extra_ms: list[float] = []
    with RayBackend(replicas=1) as one, RayBackend(replicas=2) as two:
        pools = []
        for backend in (one, two):
            _, pool = backend.start(
                bench.prepared.evaluator, bench.search_arrays, bench.prepared.search
            )
            pools.append(pool)
        for _ in range(pairs + 1):
            in_process = wall_s(lambda: [outcome_of(local, ask) for ask in asks])
            on_one, on_two = (pool_s(pool, asks) for pool in pools)
            ratios.append(on_one / on_two)
            overheads.append(on_one / in_process)
            extra_ms.append(1000 * (on_one - in_process) / len(asks))
            print(f"in-process {in_process:.2f} s, one {on_one:.2f}, two {on_two:.2f}")
    return {
        "two_replicas_speedup": statistics.median(ratios[1:]),
        "ray_over_in_process": statistics.median(overheads[1:]),
        "ray_extra_ms": statistics.median(extra_ms[1:]),
    }


class Sleeper:
    """An evaluator whose evaluations take as long as it says, whatever else this machine does."""

    def evaluate(self, strategy: Strategy, *, tokens: int | None, derivatives: bool) -> Evaluation:
        """Sleep."""
        time.sleep(_SLEEP_S)
        return Evaluation(
            strategy_key=strategy.key,
            kl=1.0,
            kept_fraction=0.5,
            gradient=None,
            tokens=tokens or 0,
            text_digest="",
            cost_units=1.0,
            wall_s=_SLEEP_S,
        )


def build_sleeper(config: None, arrays: Arrays) -> Sleeper:
    """Build one in a replica."""
    return Sleeper()


def measure_handing_over(bench: Bench, pairs: int) -> dict[str, float]:
    """Time what one Ray replica adds to an evaluation that does nothing but take its time."""
    asks = _asks(bench)
    local = Sleeper()
    extra_ms = []
    with RayBackend(build_evaluator=build_sleeper) as backend:
        pool = backend.start_pool(None, {})
        for _ in range(pairs + 1):
            in_process = wall_s(lambda: [outcome_of(local, ask) for ask in asks])
            extra_ms.append(1000 * (pool_s(pool, asks) - in_process))
    extra_ms = [total / len(asks) for total in extra_ms[1:]]
    return {"ray_extra_ms": statistics.median(extra_ms), "largest": max(extra_ms)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description="Measure how fast it is.")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--pairs", type=int, default=5)
    values = parser.parse_args(arguments)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = LearnOptions(model=values.model, out=folder / "run", evaluations=8)
        run = learn(options, backend=LocalBackend(), progress=lambda _: None)
        figures |= measure_plans(run)
        figures |= measure_cutting(run, folder)
    figures |= measure_replicas(Bench(values.model, test_tokens=512), values.pairs)
    print(table(["what", "figure"], list(figures.items())))
    print("saved to", save("speed", {"model": values.model, "figures": figures}))


if __name__ == "__main__":
    main()
