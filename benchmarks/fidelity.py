"""Does it pay to judge alternatives on few tokens first? ``python -m benchmarks.fidelity``.

The default search with and without ``--screen-tokens``, at equal units (screenings count their
share), through the loop, store and pool of a run. At each number of units a network is learned from
what was evaluated by then; its answers are judged on test text: the hypervolume of (kept fraction,
log KL) and the KL at four sparsities. ``benchmarks/results/fidelity.json`` is written after every
run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.ablation import SPARSITIES, Evaluated, front_hypervolume, learned
from benchmarks.common import Bench, save, table
from unicuco.pipeline import LocalBackend
from unicuco.search import SearchConfig
from unicuco.search.drive import drive
from unicuco.store import EvaluationStore
from unicuco.types import Ask, Evaluation

UNITS = (40.0, 81.0)
_WITH_DERIVATIVES = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a search that spent ``units`` at most came to, on test text."""

    units: float
    screen_tokens: int
    seed: int
    evaluations: int
    hypervolume: float
    kl: list[float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--tokens", type=int, default=3072, help="of the search text")
    parser.add_argument("--screen-tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--test-tokens", type=int, default=16_384)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--units", type=float, nargs="+", default=UNITS, help="of the search alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bench = Bench(options.model, tokens=options.tokens, test_tokens=options.test_tokens)
    records: list[Record] = []
    for seed in range(options.seeds):
        for screen_tokens in (0, *options.screen_tokens):
            config = replace(bench.prepared.search, seed=seed, screen_tokens=screen_tokens)
            started = time.perf_counter()
            results = searched(bench, config, max(options.units))
            for units in options.units:
                records.append(figures(bench, config, results, units))
                print(records[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
            texts = {"search": options.tokens, "test": bench.test_tokens}
            save(
                "fidelity",
                {"model": options.model, "tokens": texts, "records": [*map(asdict, records)]},
            )
    print(summary(records))


def searched(bench: Bench, config: SearchConfig, units: float) -> list[tuple[Ask, Evaluation]]:
    """Run a search that spends ``units`` at least, and return what it measured in ask order."""
    backend = LocalBackend()
    with (
        tempfile.TemporaryDirectory() as folder,
        EvaluationStore.open(Path(folder) / "evaluations.db", create=True) as store,
    ):
        search, pool = backend.start(bench.search_judge.config, bench.search_arrays, config)
        drive(
            search,
            pool,
            store,
            num_evaluations=int(units / _WITH_DERIVATIVES),  # screening adds to their cost
            on_progress=lambda _: None,
            screening=config.screening,
        )
        results = [(ask, one) for ask, one in store.read() if isinstance(one, Evaluation)]
    return sorted(results, key=lambda result: result[0].round)


def within(
    config: SearchConfig, results: Sequence[tuple[Ask, Evaluation]], units: float
) -> Evaluated:
    """Return what was evaluated on the whole text before more than ``units`` were spent.

    An evaluation costs what the alternatives did that it was chosen from, too.
    """
    places: dict[tuple[int, int], list[tuple[Ask, Evaluation]]] = {}
    for ask, one in results:
        place = config.screening.place(ask) if config.screening else ask.position
        places.setdefault((ask.round, place), []).append((ask, one))
    spent = 0.0
    evaluated: Evaluated = []
    for key in sorted(places):
        spent += sum(one.cost_units for _, one in places[key])
        if spent > units + 1e-9:
            break
        evaluated += [(ask.strategy, one) for ask, one in places[key] if ask.tokens is None]
    return evaluated


def figures(
    bench: Bench, config: SearchConfig, results: Sequence[tuple[Ask, Evaluation]], units: float
) -> Record:
    """Learn from what ``units`` paid for and judge it on test text."""
    evaluated = within(config, results, units)
    _, allocator = learned(bench.space, config, evaluated)
    return Record(
        units=units,
        screen_tokens=config.screen_tokens,
        seed=config.seed,
        evaluations=len(evaluated),
        hypervolume=front_hypervolume(bench, allocator),
        kl=bench.test_kl(allocator.allocate(SPARSITIES)),
    )


def summary(records: Sequence[Record]) -> str:
    """Return the table of medians over seeds."""
    rows: list[list[object]] = []
    for key in dict.fromkeys((record.units, record.screen_tokens) for record in records):
        own = [record for record in records if (record.units, record.screen_tokens) == key]
        evaluations = statistics.median(record.evaluations for record in own)
        volume = statistics.median(record.hypervolume for record in own)
        kl = [statistics.median(column) for column in zip(*(r.kl for r in own), strict=True)]
        rows.append([*key, len(own), evaluations, f"{volume:.4f}", *(f"{x:.4f}" for x in kl)])
    header = ["units", "screen tokens", "seeds", "evaluations", "hypervolume"]
    return table([*header, *(f"KL at {s:g}" for s in SPARSITIES)], rows)


if __name__ == "__main__":
    main()
