"""How do the units that a run needs grow with the number of axes? ``python -m benchmarks.growth``.

On a response that is not additive and whose optimum is known (`unicuco.testing.coupled`), with 8 to
224 axes: after how many units does the front that StratNet answers have 98% of the optimum's
hypervolume? Units are those of runs: 5 of preparation, then 3 for an evaluation with derivatives or
1 for one without. ``default`` is the search as it is; ``values`` the same without derivatives; the
curves alone (``fisher``) stand beside them. On the reference model, whose optimum nobody knows, at
8 (blocks) and 56 axes (sites), ``--reference``: 98% of what the longest run found at that many
axes, on test text.

The exponent is the slope of log units against log axes, by least squares over the medians. A run
that does not reach its goal counts as one unit more than it had.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.ablation import FRONT, Evaluated, learned, run_search
from benchmarks.common import save, table
from unicuco.allocate import ALLOCATORS, AllocationContext, Allocator
from unicuco.evaluate import LocalEvaluator
from unicuco.models import load_tokenizer
from unicuco.pipeline import LearnOptions
from unicuco.pipeline.preparation import prepare
from unicuco.pipeline.texts import test_windows
from unicuco.search import SearchConfig
from unicuco.search.hypervolume import quality_volume
from unicuco.surrogate import SurrogateOptions
from unicuco.testing.coupled import SITES, CoupledResponse
from unicuco.types import Strategy

AXES = (8, 16, 32, 64, 128, 224)
METHODS = {"default": SurrogateOptions(), "values": SurrogateOptions(directions=0)}
_GOAL = 0.98
_PREPARATION_UNITS = 5.0
_UNITS = 155.0  # of the longest runs: 50 evaluations with derivatives
_TEST_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class _Response:
    """A `CoupledResponse` as benchmarks want what they judge by."""

    search_judge: CoupledResponse
    preparation_units: float = _PREPARATION_UNITS


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """A prepared model; preparation costs what it costs a run."""

    search_judge: LocalEvaluator
    preparation_units: float = _PREPARATION_UNITS


Judge = Callable[[Sequence[Strategy]], list[float]]


def volume(judge: Judge, strategies: Sequence[Strategy]) -> float:
    """Return the hypervolume of strategies for the targets `FRONT`."""
    kept = [1 - sparsity for sparsity in FRONT]
    return quality_volume(list(zip(kept, judge(strategies), strict=True)))


def volumes(
    config: SearchConfig, evaluated: Evaluated, judge: Judge, fisher: Allocator
) -> Iterator[tuple[float, float]]:
    """Yield units spent and the hypervolume of what is answered then, round by round."""
    yield _PREPARATION_UNITS, volume(judge, fisher.allocate(FRONT))
    step = 3
    for count in range(step, len(evaluated) + 1, step):
        units = _PREPARATION_UNITS + sum(one.cost_units for _, one in evaluated[:count])
        allocator = learned(config.space(), config, evaluated[:count])[1]
        yield units, volume(judge, allocator.allocate(FRONT))


def units_needed(found: Iterator[tuple[float, float]], goal: float) -> tuple[float, float]:
    """Return the units at which a goal is reached, and the hypervolume there or at the end."""
    units, reached = 0.0, -math.inf
    for units, reached in found:
        if reached >= goal:
            return units, reached
    return units + 1, reached


def measure_responses(axes: Sequence[int], seeds: int) -> list[dict[str, object]]:
    """Measure every number of axes, method and seed on responses."""
    rows: list[dict[str, object]] = []
    for d in axes:
        for seed in range(seeds):
            response = CoupledResponse(d // SITES, seed)
            best = volume(response.kl, response.optimum(FRONT))
            context = AllocationContext(space=response.space, curves=response.config.axis_curves())
            fisher = ALLOCATORS["fisher"](context)
            for method, options in METHODS.items():
                config = replace(response.config, surrogate=options)
                evaluated = run_search(_Response(search_judge=response), config, _UNITS)
                found = volumes(config, evaluated, response.kl, fisher)
                units, reached = units_needed(found, _GOAL * best)
                rows.append(
                    {
                        "axes": d, "method": method, "seed": seed, "units": units,
                        "reached": reached / best,
                        "fisher": volume(response.kl, fisher.allocate(FRONT)) / best,
                    }
                )  # fmt: skip
                print(rows[-1], flush=True)
        save("growth", {"goal": _GOAL, "rows": rows})
    return rows


def measure_reference(seeds: int) -> list[dict[str, object]]:
    """Measure the reference model at the granularity of blocks and of sites."""
    rows: list[dict[str, object]] = []
    for granularity in ("block", "layer"):
        with tempfile.TemporaryDirectory() as folder:
            options = LearnOptions(model="reference", out=Path(folder), granularity=granularity)
            prepared = prepare(options, Path(folder), lambda _: None)
        search = LocalEvaluator(*prepared.judging(prepared.texts.search))
        tokenizer = load_tokenizer(prepared.loaded.folder)
        text = test_windows(tokenizer, None, tokens=_TEST_TOKENS, context=prepared.context)
        test = LocalEvaluator(*prepared.judging(text))

        def judge(strategies: Sequence[Strategy], test: LocalEvaluator = test) -> list[float]:
            return [test.evaluate(strategy).kl for strategy in strategies]

        curves = prepared.search.axis_curves()
        fisher = ALLOCATORS["fisher"](AllocationContext(space=prepared.space, curves=curves))
        found = []
        for seed in range(seeds):
            config = replace(prepared.search, seed=seed)
            evaluated = run_search(_Model(search_judge=search), config, _UNITS)
            found.append([*volumes(config, evaluated, judge, fisher)])
        best = max(reached for own in found for _, reached in own)
        for seed, own in enumerate(found):
            units, reached = units_needed(iter(own), _GOAL * best)
            rows.append(
                {
                    "axes": prepared.space.num_axes, "method": "default", "seed": seed,
                    "units": units, "reached": reached / best, "fisher": own[0][1] / best,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
        save("growth_reference", {"goal": _GOAL, "rows": rows})
    return rows


def summary(rows: Sequence[dict[str, object]]) -> str:
    """Return medians by method and number of axes, and how units grow."""
    axes = sorted({int(str(row["axes"])) for row in rows})
    lines: list[list[object]] = []
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        own = [row for row in rows if row["method"] == method]
        medians = [
            statistics.median(float(str(row["units"])) for row in own if row["axes"] == d)
            for d in axes
        ]
        logs = ([math.log(d) for d in axes], [math.log(units) for units in medians])
        slope = statistics.linear_regression(*logs).slope if len(axes) > 1 else math.nan
        lines.append([method, len({row["seed"] for row in own}), *medians, slope])
    header = ["units for 98%, median", "seeds", *(f"{d} axes" for d in axes), "exponent"]
    return table(header, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save and print."""
    parser = argparse.ArgumentParser(description="Measure how units grow with axes.")
    parser.add_argument("--axes", type=int, nargs="+", default=AXES, help="multiples of 8")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--reference", action="store_true", help="the reference model instead")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.reference:
        print(summary(measure_reference(options.seeds)))
    else:
        print(summary(measure_responses(options.axes, options.seeds)))


if __name__ == "__main__":
    main()
