"""What SparseGPT's levels bring: a run learned on them against uniform cuts, by either pruner.

Learns in this process, measures on the test text, and says what learning took: seconds, units, and
the disk. ``python -m benchmarks.levels``; results go to ``benchmarks/results/levels.json``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.common import save, table
from unicuco.pipeline import (
    CompareOptions,
    Comparison,
    LearnOptions,
    LocalBackend,
    Progress,
    Run,
    compare,
    learn,
)

_SPARSITIES: Final = (0.5, 0.6, 0.7, 0.8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Learn, compare, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        run = learn(
            LearnOptions(
                model=options.model, out=Path(folder) / "run", pruner="sparsegpt", seed=options.seed
            ),
            backend=LocalBackend(),
            progress=_ignore,
        )
        learned_s = time.perf_counter() - started
        levels = _compare(options.model, ("uniform", "fisher", "stratnet"), run)
        wanda = _compare(options.model, ("uniform",), None)
        figures = {
            "learned_s": learned_s,
            "units": run.manifest["cost_units"],
            "evaluations": run.manifest["evaluations"],
            "disk_mb": run.manifest["levels"]["bytes"] / 1e6,
        }
    results = [
        *({"pruner": "wanda", **result.to_dict()} for result in wanda),
        *({"pruner": "sparsegpt", **result.to_dict()} for result in levels),
    ]
    rows: dict[str, list[object]] = {}
    for result in results:
        name = f"{result['allocator']}, {result['pruner']}"
        rows.setdefault(name, [name]).append(result["kl"])
    print(table(["KL at", *map(str, _SPARSITIES)], list(rows.values())))
    print(table(["what", "figure"], list(figures.items())))
    document = {"model": options.model, "figures": figures, "results": results}
    print("saved to", save("levels", document))


def _compare(model: str, allocators: tuple[str, ...], run: Run | None) -> tuple[Comparison, ...]:
    options = CompareOptions(
        model=model,
        allocators=allocators,
        sparsities=_SPARSITIES,
        run=None if run is None else run.folder,
    )
    return compare(options, backend_factory=LocalBackend, progress=_ignore).results


def _ignore(step: Progress) -> None:
    """Tell nobody."""


if __name__ == "__main__":
    main()
