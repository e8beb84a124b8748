"""Is the latency of random strategies what a model of few measured shapes says? For `shrink`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import save, table
from unicuco.dimensions import Granularity, build_space
from unicuco.models import load_model
from unicuco.objectives import dense_features, latency_features
from unicuco.pipeline.latency import LatencyOptions, measure_shapes, time_strategies
from unicuco.search.drive import Progress
from unicuco.space import StrategySpace
from unicuco.types import Strategy

SMALLEST, LARGEST = 0.1, 0.7  # share of the site weights that random strategies lose


def random_budgets(space: StrategySpace, count: int, seed: int) -> list[Strategy]:
    """Return random strategies at random budgets."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, space.num_axes, generator=generator)
    shares = SMALLEST + (LARGEST - SMALLEST) * torch.rand(count, generator=generator)
    return space.decode_exact(points, [space.kept_for_sparsity(s) for s in shares.tolist()])


def tell(step: Progress) -> None:
    """Print how far it is."""
    print(f"{step.stage} {step.done}/{step.total} {step.detail}", flush=True)


def measure_latency(
    name: str, config: AutoConfig, strategies: int, options: LatencyOptions
) -> None:
    """Fit a latency model of one dense shape, then compare it with random strategies."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "dense"
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        profile = load_model(folder).profile
        space = build_space(profile, ("depth", "width"), Granularity.LAYER)
        report = measure_shapes(profile, space, folder, options, tell)
        chosen = random_budgets(space, strategies, seed=1)
        timed = time_strategies(profile, space, chosen, folder, options, tell)
    features, dense = latency_features(space.cost, chosen), dense_features(space.cost)
    predicted = torch.stack(
        [report.model.predict(features, b) / report.model.predict(dense, b)
         for b in options.batches], dim=1,
    )  # fmt: skip
    errors = (predicted / timed.ratios - 1).abs()
    rows = [
        [k, batch, float(predicted[k, m]), float(timed.ratios[k, m]), float(errors[k, m])]
        for k in range(len(chosen))
        for m, batch in enumerate(options.batches)
    ]
    print(name)
    print(table(["strategy", "batch", "predicted / dense", "measured / dense", "error"], rows))
    document = {
        **report.model.to_dict(), **report.to_dict(), "strategies": rows,
        "worst": float(errors.max()), "median": float(errors.median()),
        "within_10_percent": float((errors < 0.1).double().mean()),
    }  # fmt: skip
    kept = save(f"shrink-latency-{name.replace(' ', '-')}", document)
    print(f"worst {float(errors.max()):.3f}, median {float(errors.median()):.3f}; {kept}")
