"""How good is the front after so many units? ``python -m benchmarks.learning``.

Hypervolume of (kept fraction, log KL on test text) against units spent, preparation included (ranks
and the dense pass cost 2, the Fisher pass, which only ``default`` needs, 3). ``default`` and
``paper`` answer by the network that they learn from what was evaluated by then, at the nine
sparsities 0.1 … 0.9; before ``default`` has two evaluations, by its Fisher curves. The optimisers
of `benchmarks.optimisers` answer by all that they found to be non-dominated on the search text, be
it more than nine. ``benchmarks/results/learning.json`` is written after every run and gone on with.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.ablation import Evaluated, front_hypervolume, learned, run_search
from benchmarks.common import RESULTS, Bench, save, table
from benchmarks.optimisers import OPTIMISERS, Domain
from unicuco.allocate import ALLOCATORS
from unicuco.search import SearchConfig
from unicuco.search.hypervolume import quality_volume
from unicuco.surrogate import EPSILON
from unicuco.types import Evaluation, Strategy

UNITS = (10.0, 20.0, 40.0, 80.0, 110.0, 330.0)
PRESETS = ("default", "paper")
_VALUES_UNITS = 2.0  # of preparation, for those who need no Fisher pass
_COSTS = {"default": 3.0}  # of one evaluation; 1 for all others


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a method that spent ``units`` at most came to; seconds are those of its own thinking."""

    method: str
    seed: int
    units: float
    evaluations: int
    hypervolume: float
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, save and print."""
    methods = (*PRESETS, *OPTIMISERS)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--tokens", type=int, default=3072, help="of the search text")
    parser.add_argument("--test-tokens", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--units", type=float, nargs="+", default=UNITS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bench = Bench(options.model, tokens=options.tokens, test_tokens=options.test_tokens)
    setting = {"model": options.model, "search": options.tokens, "test": bench.test_tokens}
    records = known(setting)
    for seed in range(options.seeds):
        for method in options.methods:
            done = {r.units for r in records if (r.method, r.seed) == (method, seed)}
            if done >= set(options.units):
                continue
            new = measured(bench, method, seed, sorted(options.units))
            others = [r for r in records if (r.method, r.seed) != (method, seed)]
            records = [*others, *new]
            save("learning", {"setting": setting, "records": [*map(asdict, records)]})
            print(f"seed {seed} {method}: {[round(r.hypervolume, 3) for r in new]}", flush=True)
    print(summary(records))


def known(setting: dict[str, object]) -> list[Record]:
    """Return the records of this setting that are there."""
    path = RESULTS / "learning.json"
    if not path.exists():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    return [Record(**r) for r in document["records"]] if document["setting"] == setting else []


def measured(bench: Bench, method: str, seed: int, units: Sequence[float]) -> list[Record]:
    """Run one method once and judge what it had after each number of units."""
    started = time.perf_counter()
    config = replace(bench.prepared.search, seed=seed)
    if method in PRESETS:
        config = replace(config, preset=method)
        spare = bench.preparation_units - prepared_units(method)
        evaluated = run_search(bench, config, units[-1] + spare)
    else:
        evaluated = optimised(bench, method, seed, num_evaluations(method, units[-1]))
    seconds = time.perf_counter() - started - sum(one.wall_s for _, one in evaluated)
    records = []
    for limit in units:
        own = evaluated[: num_evaluations(method, limit)]
        volume = (
            network_volume(bench, config, own)
            if method in PRESETS
            else quality_volume(judged(bench, non_dominated(own)))
        )
        records.append(
            Record(
                method=method,
                seed=seed,
                units=limit,
                evaluations=len(own),
                hypervolume=volume,
                seconds=seconds,
            )
        )
    return records


def prepared_units(method: str) -> float:
    """Return what a method pays before its first evaluation."""
    return Bench.preparation_units if method == "default" else _VALUES_UNITS


def num_evaluations(method: str, units: float) -> int:
    """Return how many evaluations so many units pay for."""
    return int((units - prepared_units(method) + 1e-9) / _COSTS.get(method, 1.0))


def network_volume(bench: Bench, config: SearchConfig, evaluated: Evaluated) -> float:
    """Return the hypervolume of what a network learned from evaluations answers."""
    if len(evaluated) < 2:
        return front_hypervolume(bench, ALLOCATORS["fisher"](bench.context))
    return front_hypervolume(bench, learned(bench.space, config, evaluated)[1])


def optimised(bench: Bench, method: str, seed: int, count: int) -> Evaluated:
    """Let an optimiser judge ``count`` strategies by their KL on the search text."""
    profile = bench.prepared.evaluator.profile
    domain = Domain(
        space=bench.space,
        total_params=profile.total_params,
        site_weights=profile.num_site_weights,
    )
    optimiser = OPTIMISERS[method](domain, seed)
    evaluated: Evaluated = []
    while len(evaluated) < count:
        points = optimiser.ask()[: count - len(evaluated)]
        new = [(s, bench.search_judge.evaluate(s)) for s in bench.space.decode(points)]
        optimiser.tell(points, torch.tensor([objectives(one) for _, one in new]).double())
        evaluated += new
    return evaluated


def objectives(one: Evaluation) -> tuple[float, float]:
    """Return what optimisers minimise."""
    return one.kept_fraction, math.log(one.kl + EPSILON)


def non_dominated(evaluated: Evaluated) -> list[tuple[Strategy, float]]:
    """Return the strategies that no other one beats in both size and KL, with what they keep."""
    best = float("inf")
    kept = []
    for strategy, one in sorted(evaluated, key=lambda pair: (pair[1].kept_fraction, pair[1].kl)):
        if one.kl < best:
            best = one.kl
            kept.append((strategy, one.kept_fraction))
    return kept


def judged(bench: Bench, strategies: Iterable[tuple[Strategy, float]]) -> list[tuple[float, float]]:
    """Return what strategies keep and their KL on test text."""
    return [(kept, bench.test_judge.evaluate(strategy).kl) for strategy, kept in strategies]


def summary(records: Sequence[Record]) -> str:
    """Return the table of median hypervolumes."""
    units = sorted({record.units for record in records})
    rows: list[list[object]] = []
    for method in dict.fromkeys(record.method for record in records):
        own = [record for record in records if record.method == method]
        medians = [
            statistics.median(r.hypervolume for r in own if r.units == limit) for limit in units
        ]
        seeds = len({record.seed for record in own})
        seconds = statistics.median(record.seconds for record in own)
        rows.append([method, seeds, *medians, f"{seconds:.0f}"])
    return table(["method", "seeds", *(f"{u:g} units" for u in units), "own seconds"], rows)


if __name__ == "__main__":
    main()
