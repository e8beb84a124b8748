"""Which part of learning helps, and how much of it? Three parts of ``benchmarks.quality``.

- ``ablation``: uniform and Fisher; the surrogate on values, then on values and derivatives, each
  minimised per target and through StratNet (one run of 110 units for all targets together); the
  same without Fisher curves;
- ``presets``: hypervolume of (size, test KL) of ``default`` and ``paper`` at equal units;
- ``evaluations``: what StratNet answers after the first 6, 9, … 27 evaluations with derivatives of
  one run. A shorter run asks the same first ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from benchmarks.common import Bench, save, table
from unicuco.allocate import ALLOCATORS, Allocator
from unicuco.search import SearchConfig, build_search, learn_network
from unicuco.search.hypervolume import hypervolume
from unicuco.space import StrategySpace
from unicuco.stratnet import StratNetAllocator
from unicuco.surrogate import EPSILON, Surrogate, SurrogateOptions
from unicuco.types import Evaluation, Strategy

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
UNITS = 110.0
VALIDATION_UNITS = 19.0  # what calibrating the intervals costs a run; counted, though unused here
STEPS = tuple(range(6, 28, 3))  # evaluations with derivatives, whole rounds
FRONT = tuple(round(0.1 + 0.1 * k, 1) for k in range(9))  # 0.1 … 0.9, for the hypervolume

Evaluated = list[tuple[Strategy, Evaluation]]


class Judging(Protocol):
    """Judges strategies on the search text."""

    def evaluate(self, strategy: Strategy, *, derivatives: bool = False) -> Evaluation:
        """Measure one strategy."""


class Searched(Protocol):
    """What a search needs of a `Bench`, or of what stands for one."""

    @property
    def preparation_units(self) -> float:
        """Units that are spent before anything is asked."""

    @property
    def search_judge(self) -> Judging:
        """Who evaluates."""


def run_search(bench: Searched, config: SearchConfig, units: float) -> Evaluated:
    """Run a preset's search in this process until ``units`` are spent, preparation included."""
    search = build_search(config)
    spent = bench.preparation_units
    evaluated: Evaluated = []
    round_ = 0
    while True:
        results = []
        for ask in search.ask(round_):
            cost = 3.0 if ask.derivatives else 1.0
            if spent + cost > units + 1e-9:
                return evaluated
            outcome = bench.search_judge.evaluate(ask.strategy, derivatives=ask.derivatives)
            spent += cost
            results.append((ask, outcome))
            evaluated.append((ask.strategy, outcome))
        search.tell(round_, results)
        round_ += 1


def learned(
    space: StrategySpace, config: SearchConfig, evaluated: Evaluated
) -> tuple[Surrogate, StratNetAllocator]:
    """Learn surrogate and network as a run does at its end."""
    config = replace(config, training=replace(config.training, steps=400))
    surrogate, net = learn_network(config, evaluated, seed=config.seed)
    return surrogate, StratNetAllocator(net, space)


def optimise_directly(
    bench: Bench, surrogate: Surrogate, sparsities: Sequence[float]
) -> list[Strategy]:
    """Minimise the surrogate for every target on its own, without a network."""
    kept = torch.tensor([bench.space.kept_for_sparsity(s) for s in sparsities]).double()
    z = torch.zeros(len(sparsities), bench.space.num_axes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(300):
        mean, std = surrogate.posterior(bench.space.project_logits(z, kept))
        optimizer.zero_grad()
        (mean + std).sum().backward()
        optimizer.step()
    points = bench.space.project_logits(z, kept).detach()
    return bench.space.decode_exact(points, [int(k) for k in kept])


def front_hypervolume(bench: Bench, allocator: Allocator) -> float:
    """Return the hypervolume of (kept fraction, log test KL), bounded by (1, KL of 3 nats)."""
    kl = torch.tensor(bench.test_kl(allocator.allocate(FRONT)), dtype=torch.float64)
    points = torch.stack([1 - torch.tensor(FRONT).double(), (kl + EPSILON).log()], dim=1)
    return hypervolume(points, torch.tensor([1.0, 1.1], dtype=torch.float64))


def ablation_arms(bench: Bench, seed: int, units: float) -> dict[str, list[Strategy]]:
    """Return the strategies of every arm at `SPARSITIES`, each arm at the same units."""
    base = replace(bench.prepared.search, seed=seed)
    arms: dict[str, list[Strategy]] = {}
    variants = {
        "Fisher + GP on values": SurrogateOptions(directions=0),
        "+ derivatives": SurrogateOptions(),
        "derivatives without Fisher curves": SurrogateOptions(curves=False),
    }
    for name, options in variants.items():
        config = replace(base, surrogate=options)
        evaluated = run_search(bench, config, units)
        surrogate, allocator = learned(bench.space, config, evaluated)
        arms[f"{name}, per target"] = optimise_directly(bench, surrogate, SPARSITIES)
        arms[f"{name}, StratNet"] = allocator.allocate(SPARSITIES)
    return arms


def measure_ablation(bench: Bench, seeds: int) -> None:
    """Measure one-shot allocators once and every arm of the ablation for each seed."""
    kl = {
        name: [[value] for value in bench.test_kl(make(bench.context).allocate(SPARSITIES))]
        for name, make in ((name, ALLOCATORS[name]) for name in ("uniform", "fisher"))
    }
    for seed in range(seeds):
        started = time.perf_counter()
        for name, strategies in ablation_arms(bench, seed, UNITS - VALIDATION_UNITS).items():
            columns = kl.setdefault(name, [[] for _ in SPARSITIES])
            for column, value in zip(columns, bench.test_kl(strategies), strict=True):
                column.append(value)
        print(f"ablation: seed {seed} took {time.perf_counter() - started:.0f} s", flush=True)
        _save("ablation", bench, {"kl": kl, "units": UNITS})
    print(ratios(kl, [column[0] for column in kl["uniform"]]))


def measure_presets(bench: Bench, seeds: int) -> None:
    """Measure the hypervolume of both presets at `UNITS`, for each seed."""
    volumes: dict[str, list[float]] = {"default": [], "paper": []}
    for seed in range(seeds):
        for preset, values in volumes.items():
            config = replace(bench.prepared.search, seed=seed, preset=preset)
            evaluated = run_search(bench, config, UNITS - VALIDATION_UNITS)
            values.append(front_hypervolume(bench, learned(bench.space, config, evaluated)[1]))
        print(f"presets: seed {seed} {volumes}", flush=True)
        _save("presets", bench, {"hypervolume": volumes, "units": UNITS})
    rows = [[seed, *pair] for seed, pair in enumerate(zip(*volumes.values(), strict=True))]
    print(table(["seed", *volumes], rows))


def measure_evaluations(bench: Bench, seeds: int) -> None:
    """Measure StratNet after the first `STEPS` evaluations, for each seed."""
    uniform = bench.test_kl(ALLOCATORS["uniform"](bench.context).allocate(SPARSITIES))
    kl: dict[str, list[list[float]]] = {str(n): [[] for _ in SPARSITIES] for n in STEPS}
    units = bench.preparation_units + 3.0 * STEPS[-1]
    for seed in range(seeds):
        config = replace(bench.prepared.search, seed=seed)
        evaluated = run_search(bench, config, units)
        for number in STEPS:
            allocator = learned(bench.space, config, evaluated[:number])[1]
            answers = bench.test_kl(allocator.allocate(SPARSITIES))
            for column, value in zip(kl[str(number)], answers, strict=True):
                column.append(value)
        _save("evaluations", bench, {"kl": kl, "uniform": uniform})
        print(f"evaluations: seed {seed}\n{ratios(kl, uniform)}", flush=True)


def ratios(kl: dict[str, list[list[float]]], uniform: Sequence[float]) -> str:
    """Return the table of medians as ratios to uniform."""
    rows = [
        [name, len(columns[0])]
        + [statistics.median(column) / u for column, u in zip(columns, uniform, strict=True)]
        for name, columns in kl.items()
    ]
    return table(["KL / uniform's", "seeds", *map(str, SPARSITIES)], rows)


def _save(part: str, bench: Bench, figures: dict[str, object]) -> None:
    texts = {"search": bench.prepared.texts.search.num_tokens, "test": bench.test_tokens}
    document = {"part": part, "model": bench.model, "sparsities": SPARSITIES, "tokens": texts}
    save(part, {**document, **figures})
