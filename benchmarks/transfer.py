"""How many evaluations does another run save? ``python -m benchmarks.transfer [--sibling MODEL]``.

Runs of the reference model, cold and warmed by a run of another model (``learn --warm-from``):
hypervolume of (kept fraction, log test KL) after every round. ``--sibling reference``, the default,
is the model itself with another seed: no sibling can know more, so this bounds what can be saved.
``--sibling wikitext`` is the second model of `benchmarks.second_model`: another family of the same
kinds of sites, another size, other text. ``saved`` is the share of a cold run's units after which
the warmed one is as good as the cold one at its end; preparation is paid by both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.ablation import Evaluated, front_hypervolume, learned, run_search
from benchmarks.common import Bench, save, table
from benchmarks.second_model import resolve
from unicuco.pipeline import LearnOptions, LocalBackend, learn
from unicuco.pipeline.warming import make_guide
from unicuco.search import SearchConfig
from unicuco.search.transfer import Guide

EVALUATIONS = 21
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
    rows: list[dict[str, object]] = []
    for seed in range(options.seeds):
        config = replace(bench.prepared.search, seed=seed)
        guided = replace(config, guide=guide_of(options.sibling, bench, seed))
        cold, warm = volumes(bench, config), volumes(bench, guided)
        rounds = next((k + 1 for k, one in enumerate(warm) if one >= cold[-1]), len(warm) + 1)
        saved = 1 - (bench.preparation_units + 3.0 * _ROUND * rounds) / (
            bench.preparation_units + 3.0 * EVALUATIONS
        )
        rows.append({"seed": seed, "cold": cold, "warm": warm, "saved": saved})
        print(rows[-1], flush=True)
        save(f"transfer-{options.sibling}", {"sibling": options.sibling, "rows": rows})
    shares = [float(str(row["saved"])) for row in rows]
    print(table(["seeds", "saved, median"], [[len(rows), statistics.median(shares)]]))


if __name__ == "__main__":
    main()
