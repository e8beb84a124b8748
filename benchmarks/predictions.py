"""Do predictions hold on text that nothing has seen?

A run is learned; then fresh strategies are measured on test text, in turns on several texts, each
with as many tokens as the validation text has and windows spread over the whole test text, for what
texts differ by is part of what intervals promise. Strategies are those that StratNet answers to
targets spread over the learned range, and random ones (budgets as spread, axes scattered around
them in logits). Reported: the share of measurements inside their 95% interval, over all and in each
third of the range of predicted KL, and how wide intervals are (hi95 / lo95). Then random ``max_kl``
requests: the share whose measured KL keeps the bound, and how much of the bound they use.

    python -m benchmarks.predictions [--strategies 600] [--requests 64] [--seeds 0 1 2 3 4]

``benchmarks/results/predictions.json`` is written after every seed; other seeds' figures stay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.common import RESULTS, Bench, save, table
from unicuco.calibration import TokenSet
from unicuco.evaluate import LocalEvaluator
from unicuco.models import load_tokenizer
from unicuco.pipeline import LearnOptions, LocalBackend, Run, learn
from unicuco.pipeline.texts import test_windows
from unicuco.space import StrategySpace
from unicuco.types import Plan, Prediction, Request, Strategy, Target

_TOKENS: Final = 3072
_TEXTS: Final = 8
_FROM: Final = 0.1  # above the lowest learned sparsity: below, nearly nothing is lost
_SCATTER: Final = (0.0, 1.5)  # standard deviation of random strategies' logits: even in this range


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How ``count`` predictions held: shares inside, and the median of hi95 / lo95."""

    count: int
    inside: float
    thirds: tuple[float, float, float]
    median_width: float


def coverage(predictions: Sequence[Prediction], measured: Sequence[float]) -> Coverage:
    """Compare predictions with measurements; thirds are of equal counts by predicted mean."""
    pairs = sorted(zip(predictions, measured, strict=True), key=lambda pair: pair[0].mean)
    inside = [p.lo95 <= kl <= p.hi95 for p, kl in pairs]
    cuts = [round(k * len(inside) / 3) for k in range(4)]
    first, second, third = (statistics.fmean(inside[a:b]) for a, b in itertools.pairwise(cuts))
    return Coverage(
        count=len(inside),
        inside=statistics.fmean(inside),
        thirds=(first, second, third),
        median_width=statistics.median(p.hi95 / max(p.lo95, 1e-9) for p in predictions),
    )


def random_strategies(
    space: StrategySpace,
    count: int,
    sparsity_range: tuple[float, float],
    generator: torch.Generator,
) -> list[Strategy]:
    """Draw strategies whose axes lie scattered around uniform, projected to their budgets."""
    low, high = sparsity_range
    targets = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    least, most = _SCATTER
    spread = least + (most - least) * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    logits = spread * torch.randn(count, space.num_axes, generator=generator, dtype=torch.float64)
    budgets = [space.kept_for_sparsity(target) for target in targets.tolist()]
    points = space.project_logits(logits, torch.tensor(budgets, dtype=torch.float64))
    return space.decode_exact(points, budgets)


def planned(run: Run, target: Target, values: Sequence[float]) -> list[Plan]:
    """Return the plans of requests that can all be met."""
    plans = run.plan([Request(target=target, value=value) for value in values])
    for plan in plans:
        if not isinstance(plan, Plan):
            raise plan
    return [plan for plan in plans if isinstance(plan, Plan)]


class FreshTexts:
    """Judges on several texts of the test part, none of which shares a window with another."""

    def __init__(self, bench: Bench) -> None:
        prepared = bench.prepared
        windows = test_windows(
            load_tokenizer(prepared.loaded.folder),
            None,
            tokens=_TEXTS * _TOKENS,
            context=prepared.context,
        ).ids
        self._judges = [
            LocalEvaluator(*prepared.judging(TokenSet.from_ids(windows[k::_TEXTS])))
            for k in range(_TEXTS)
        ]

    def kl(self, strategies: Sequence[Strategy]) -> list[float]:
        """Return the KL of each strategy on one text, the next one's on the next text."""
        return [
            judge.evaluate(strategy).kl
            for strategy, judge in zip(strategies, itertools.cycle(self._judges), strict=False)
        ]


def measure(
    run: Run, texts: FreshTexts, options: argparse.Namespace, seed: int
) -> dict[str, object]:
    """Return how both kinds of predictions held, together and each, and how bounds did."""
    generator = torch.Generator().manual_seed(seed)
    low, high = run.sparsity_range
    low += _FROM

    def draws(count: int) -> list[float]:
        return torch.rand(count, generator=generator, dtype=torch.float64).tolist()

    own = planned(run, Target.SPARSITY, [low + (high - low) * u for u in draws(options.strategies)])
    random = random_strategies(run.planner.space, options.strategies, (low, high), generator)
    predicted = {"stratnet": [p.kl for p in own], "random": run.planner.predict(random)}
    measured = {
        "stratnet": texts.kl([plan.strategy for plan in own]),
        "random": texts.kl(random),
    }
    parts = {name: coverage(predicted[name], measured[name]) for name in predicted}
    parts["both"] = coverage(
        [p for kind in predicted.values() for p in kind],
        [kl for kind in measured.values() for kl in kind],
    )
    least, most = (math.log(p.kl.hi95) for p in planned(run, Target.SPARSITY, [low, high]))
    bounds = [math.exp(least + (most - least) * u) for u in draws(options.requests)]
    answers = planned(run, Target.MAX_KL, bounds)
    used = [
        kl / bound
        for kl, bound in zip(texts.kl([p.strategy for p in answers]), bounds, strict=True)
    ]
    return {
        "seed": seed,
        "coverage": {name: asdict(part) for name, part in parts.items()},
        "max_kl": {
            "count": len(used),
            "kept": statistics.fmean(share <= 1 for share in used),
            "median_used": statistics.median(used),
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description="Measure how predictions hold.")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--strategies", type=int, default=600, help="of each kind")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    setting = {
        "model": options.model, "strategies": options.strategies, "requests": options.requests,
        "tokens": _TOKENS, "texts": _TEXTS,
    }  # fmt: skip
    found = known(setting)
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            chosen = LearnOptions(
                model=options.model, out=Path(folder) / "run", tokens=_TOKENS, seed=seed
            )
            run = learn(chosen, backend=LocalBackend(), progress=lambda _: None)
            bench = Bench(options.model, tokens=_TOKENS, test_tokens=_TOKENS, seed=seed)
            found[seed] = measure(run, FreshTexts(bench), options, seed)
        show(found[seed])
        save("predictions", {"setting": setting, "seeds": [found[one] for one in sorted(found)]})


# Any: JSON
def known(setting: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return what there is of this setting, by seed."""
    path = RESULTS / "predictions.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if document.get("setting") != setting:
        return {}
    return {one["seed"]: one for one in document["seeds"]}


# Any: JSON
def show(found: dict[str, Any]) -> None:
    """Print one seed's table."""
    rows = [
        [name, part["count"], part["inside"], *part["thirds"], part["median_width"]]
        for name, part in found["coverage"].items()
    ]
    header = ["strategies", "measured", "inside", "low KL", "middle", "high KL", "hi95 / lo95"]
    print(f"seed {found['seed']}")
    print(table(header, rows))
    bounds = found["max_kl"]
    print(
        f"{bounds['count']} bounds on KL: {bounds['kept']:.1%} kept, "
        f"median share used {bounds['median_used']:.2f}"
    )


if __name__ == "__main__":
    main()
