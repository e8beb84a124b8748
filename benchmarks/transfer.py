"""How many evaluations does another run save? ``python -m benchmarks.transfer [--sibling MODEL]``.

Runs of the reference model, cold and warmed by a run of another model (``learn --warm-from``):
hypervolume of (kept fraction, log test KL) after every round. ``--sibling reference``, the default,
is the model itself with another seed: no sibling can know more, so this bounds what can be saved.
``--sibling wikitext`` is the second model of `benchmarks.second_model`: another family of the same
kinds of sites, another size, other text.

``saved`` compares the units after which the two have a share of the hypervolume that the cold run
has at its end: 98% as in `benchmarks.growth`, more, and all of it, where what the training of a
network adds by chance decides. Preparation is paid by both. A run that does not get there counts as
one round more than it had.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation import Evaluated, front_hypervolume, learned, run_search
from benchmarks.common import Bench, save, table
from benchmarks.second_model import resolve
from unicuco.pipeline import LearnOptions, LocalBackend, learn
from unicuco.pipeline.warming import make_guide
from unicuco.search import SearchConfig
from unicuco.search.transfer import Guide

EVALUATIONS = 21
GOALS = (0.98, 0.995, 0.998, 1.0)
_ROUND = 3
_OTHER_SEED = 1000


def guide_of(sibling: str, bench: Bench, seed: int) -> Guide:
    """Learn a run of a sibling with default options, and return what it says of the model."""
    subject = resolve(sibling)
    with tempfile.TemporaryDirectory() as scratch:
        options = LearnOptions(
            model=subject.path,
            out=Path(scratch) / "run",
            calibration=subject.calibration,
            seed=_OTHER_SEED + seed,
        )
        run = learn(options, backend=LocalBackend(), progress=lambda _: None)
        warmed = LearnOptions(model=bench.model, out=Path(scratch), warm_from=str(run.folder))
        return make_guide(warmed, bench.space)


def volumes(bench: Bench, config: SearchConfig) -> list[float]:
    """Return the hypervolume after every round of a run."""
    units = bench.preparation_units + 3.0 * EVALUATIONS
    evaluated: Evaluated = run_search(bench, config, units)
    counts = range(_ROUND, EVALUATIONS + 1, _ROUND)
    return [
        front_hypervolume(bench, learned(bench.space, config, evaluated[:n])[1]) for n in counts
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save and print."""
    parser = argparse.ArgumentParser(description="Measure what another run saves.")
    parser.add_argument("--sibling", default="reference", help="a model, or wikitext")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-tokens", type=int, default=4096)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bench = Bench("reference", test_tokens=options.test_tokens)
    rows: list[dict[str, Any]] = []  # JSON
    for seed in range(options.seeds):
        config = replace(bench.prepared.search, seed=seed)
        guided = replace(config, guide=guide_of(options.sibling, bench, seed))
        cold, warm = volumes(bench, config), volumes(bench, guided)
        rows.append({"seed": seed, "cold": cold, "warm": warm})
        print(rows[-1], flush=True)
        save(f"transfer-{options.sibling}", {"sibling": options.sibling, "rows": rows})
    print(summary(rows))


def units_to(goal: float, curve: Sequence[float]) -> float:
    """Return the units after which a run's hypervolumes have reached a goal."""
    rounds = next((k + 1 for k, one in enumerate(curve) if one >= goal), len(curve) + 1)
    return Bench.preparation_units + 3.0 * _ROUND * rounds


def summary(rows: Sequence[dict[str, Any]]) -> str:  # Any: JSON
    """Return the median hypervolumes of every round, and what is saved."""
    rounds = range(EVALUATIONS // _ROUND)
    lines: list[list[object]] = [
        [name, *(statistics.median(row[name][k] for row in rows) for k in rounds)]
        for name in ("cold", "warm")
    ]
    curves = table(["run", *(f"{_ROUND * (k + 1)} evaluations" for k in rounds)], lines)
    lines = []
    for goal in GOALS:
        pairs = [
            (
                units_to(goal * row["cold"][-1], row["cold"]),
                units_to(goal * row["cold"][-1], row["warm"]),
            )
            for row in rows
        ]
        cold, warm = (statistics.median(each) for each in zip(*pairs, strict=True))
        lines.append(
            [f"{goal:.1%}", len(rows), cold, warm, statistics.median(1 - w / c for c, w in pairs)]
        )
    return (
        curves
        + "\n"
        + table(["of the cold end", "seeds", "cold units", "warm units", "saved"], lines)
    )


if __name__ == "__main__":
    main()
