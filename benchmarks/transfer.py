"""How many evaluations does another run save? ``python -m benchmarks.transfer``.

Runs of the reference model, cold and warmed by a run of another model (``learn --warm-from``):
hypervolume of (kept fraction, log test KL) after every round. The siblings, by name:

- ``reference``: the model itself with another seed. No sibling can know more, so this bounds what
  can be saved.
- ``smaller``: a Llama of half the blocks and a quarter of the parameters, of the same text.
- ``wikitext``: another family of the same kinds of sites, a third of the size, other text. The last
  two are of `benchmarks.second_model`, and trained where they are not there yet.

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
from benchmarks.second_model import SECOND, SMALLER, resolve
from unicuco.pipeline import LearnOptions, LocalBackend, learn
from unicuco.pipeline.warming import take_prior
from unicuco.search import SearchConfig
from unicuco.surrogate import Prior

EVALUATIONS = 21
GOALS = (0.98, 0.995, 0.998, 1.0)
_REFERENCE = "reference"
_ROUND = 3
_COUNTS = range(_ROUND, EVALUATIONS + 1, _ROUND)  # of evaluations, after each round
_OTHER_SEED = 1000


def prior_from(sibling: str, bench: Bench, seed: int) -> Prior:
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
        return take_prior(warmed, bench.space)


def volumes(bench: Bench, config: SearchConfig) -> list[float]:
    """Return the hypervolume after every round of a run."""
    units = bench.preparation_units + 3.0 * EVALUATIONS
    evaluated: Evaluated = run_search(bench, config, units)
    return [
        front_hypervolume(bench, learned(bench.space, config, evaluated[:n])[1]) for n in _COUNTS
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save and print."""
    parser = argparse.ArgumentParser(description="Measure what another run saves.")
    parser.add_argument("--siblings", nargs="+", default=[_REFERENCE, SMALLER, SECOND])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-tokens", type=int, default=4096)
    options = parser.parse_args(arguments)
    for sibling in options.siblings:
        resolve(sibling)  # trained, or found missing, before hours are spent
    torch.set_num_threads(1)
    bench = Bench(_REFERENCE, test_tokens=options.test_tokens)
    rows: list[dict[str, Any]] = []  # JSON
    for seed in range(options.seeds):
        config = replace(bench.prepared.search, seed=seed)
        rows.append({"seed": seed, "cold": volumes(bench, config), "warm": {}})
        for sibling in options.siblings:
            warmed = replace(config, prior=prior_from(sibling, bench, seed))
            rows[-1]["warm"][sibling] = volumes(bench, warmed)
        print(rows[-1], flush=True)
        save("transfer", {"siblings": options.siblings, "rows": rows})
    print(summary(rows))


def units_to(goal: float, curve: Sequence[float]) -> float:
    """Return the units after which a run's hypervolumes have reached a goal."""
    rounds = next((k + 1 for k, one in enumerate(curve) if one >= goal), len(curve) + 1)
    return Bench.preparation_units + 3.0 * _ROUND * rounds


def summary(rows: Sequence[dict[str, Any]]) -> str:  # Any: JSON
    """Return the median hypervolumes of every round, and what is saved."""
    siblings = list(rows[0]["warm"])
    curves = {"cold": [row["cold"] for row in rows]}
    curves |= {f"by {name}": [row["warm"][name] for row in rows] for name in siblings}
    medians = [
        [name, *(statistics.median(column) for column in zip(*runs, strict=True))]
        for name, runs in curves.items()
    ]
    saved = [
        [f"{goal:.1%}", name, len(rows), *_saved(goal, rows, name)]
        for name in siblings
        for goal in GOALS
    ]
    header = ["of the cold end", "warmed by", "seeds", "cold units", "warm units", "saved"]
    return "\n".join(
        (table(["run", *(f"{n} evaluations" for n in _COUNTS)], medians), table(header, saved))
    )


# Any: JSON
def _saved(goal: float, rows: Sequence[dict[str, Any]], sibling: str) -> tuple[float, float, float]:
    """Return the medians of the units of cold and warm runs, and of the share saved."""
    goals = [goal * row["cold"][-1] for row in rows]
    cold = [units_to(at, row["cold"]) for at, row in zip(goals, rows, strict=True)]
    warm = [units_to(at, row["warm"][sibling]) for at, row in zip(goals, rows, strict=True)]
    shares = [1 - w / c for c, w in zip(cold, warm, strict=True)]
    return statistics.median(cold), statistics.median(warm), statistics.median(shares)


if __name__ == "__main__":
    main()
