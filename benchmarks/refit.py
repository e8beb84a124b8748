"""What does fitting the surrogate to 2,000 evaluations cost? ``python -m benchmarks.refit``.

Evaluations with derivatives of a response that is not additive (`unicuco.testing.coupled`), random
ones around what single sites say, at budgets over the whole range. ``run`` is the fit as runs do
it; ``exact`` factors all evaluations with as many derivatives each as 4,000 rows have room for, and
optimises the hyperparameters in 100 steps of the exact likelihood, of 1,600 rows at a time;
``long`` is ``run`` with 100 steps, and where there are inducing points each of all evaluations by
300. Reported: CPU seconds of a fit on one thread and seconds by the clock on two (medians of three;
of the others the former, once), the process's peak memory beside what it had before, and the mean
log likelihood of 500 other evaluations' log KL. Every fit in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.common import save, table
from benchmarks.predictions import random_strategies
from unicuco.search.front import observe
from unicuco.surrogate import EPSILON, GaussianProcess, SurrogateOptions
from unicuco.testing.coupled import SITES, CoupledResponse

EVALUATIONS = (21, 200, 2000)
HELD_OUT = 500
FITS = {
    "run": (SurrogateOptions(), 3),
    "exact": (SurrogateOptions(rows=4000, tuning_rows=1600, steps=100), 1),
    "long": (SurrogateOptions(inducing_tuning=300, inducing_tuning_rows=4000, steps=100), 1),
}


def measure(fit: str, evaluations: int, axes: int, seed: int) -> dict[str, object]:
    """Fit in this process and judge by what was held out."""
    response = CoupledResponse(axes // SITES, seed)
    generator = torch.Generator().manual_seed(seed)
    strategies = random_strategies(
        response.space, evaluations + HELD_OUT, response.config.sparsity_range, generator
    )
    known, other = strategies[:evaluations], strategies[evaluations:]
    observed = observe(response.space, [(s, response.evaluate(s, derivatives=True)) for s in known])
    options, times = FITS[fit]
    curves, before = response.config.axis_curves(), _peak()
    surrogate = GaussianProcess(options, curves)

    def median_s(clock: Callable[[], float], threads: int) -> float:
        torch.set_num_threads(threads)
        seconds = []
        for _ in range(times):
            started = clock()
            surrogate.fit(observed)
            seconds.append(clock() - started)
        return statistics.median(seconds)

    clock_s = median_s(time.perf_counter, 2) if times > 1 else None
    cpu_s = median_s(time.process_time, 1)
    points = response.space.encode(other)
    mean, std = surrogate.posterior(points)
    logs = (torch.tensor(response.kl(other), dtype=torch.float64) + EPSILON).log()
    spread = std.square() + options.value_noise**2
    likelihood = -0.5 * ((logs - mean).square() / spread + (2 * math.pi * spread).log())
    return {
        "fit": fit, "evaluations": evaluations, "axes": axes, "seed": seed,
        "cpu_seconds": cpu_s, "clock_seconds_2_threads": clock_s, "peak_bytes": _peak() - before,
        "log_likelihood": float(likelihood.mean()),
        "error": float((logs - mean).square().mean().sqrt()),
    }  # fmt: skip


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save and print; ``--one`` is for the processes that this starts."""
    parser = argparse.ArgumentParser(description="Measure fits of many evaluations.")
    parser.add_argument("--axes", type=int, nargs="+", default=(56, 224), help="multiples of 8")
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        fit, *numbers = options.one
        print(json.dumps(measure(fit, *map(int, numbers))))
        return
    rows: list[dict[str, Any]] = []  # Any: JSON
    for axes in options.axes:
        for evaluations in options.evaluations:
            for seed in range(options.seeds):
                for fit in FITS:
                    words = [fit, str(evaluations), str(axes), str(seed)]
                    command = [sys.executable, "-m", "benchmarks.refit", "--one", *words]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    rows.append(json.loads(done.stdout.splitlines()[-1]))
                    print(rows[-1], flush=True)
                save("refit", {"fits": {f: asdict(o) for f, (o, _) in FITS.items()}, "rows": rows})
    print(summary(rows))


def summary(rows: Sequence[dict[str, Any]]) -> str:  # Any: JSON
    """Return medians over seeds."""
    groups: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["axes"], row["evaluations"], row["fit"]), []).append(row)
    header = [
        "axes",
        "evaluations",
        "fit",
        "seeds",
        "CPU seconds",
        "seconds, 2 threads",
        "peak MiB",
        "log likelihood",
        "rms",
    ]
    lines = [
        [
            *key, len(own),
            statistics.median(row["cpu_seconds"] for row in own),
            _median(row["clock_seconds_2_threads"] for row in own),
            round(max(row["peak_bytes"] for row in own) / 2**20),
            statistics.median(row["log_likelihood"] for row in own),
            statistics.median(row["error"] for row in own),
        ]
        for key, own in groups.items()
    ]  # fmt: skip
    return table(header, lines)


def _median(values: Iterable[float | None]) -> float | str:
    measured = [value for value in values if value is not None]
    return statistics.median(measured) if measured else "–"


if __name__ == "__main__":
    main()
