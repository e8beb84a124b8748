"""Is learning once as good as searching per request? Every method, at equal budgets.

Parts, each with a file of results of its own that is written after every job and resumed:

- every allocator's name (``uniform``, ``owl``, …, ``evopress``, ``optspa``, ``stratnet``): KL and
  perplexity on test text that nothing learned from, seconds and units per request, and what is paid
  once. One run per seed serves every table. EvoPress gets max(the run's units, 300) units for each
  request;
- ``tasks``: accuracy of those strategies by log likelihood, through lm-eval, from local files; a
  strategy that was found on another machine is found again, and its record stays;
- ``ablation``, ``presets`` and ``evaluations``: which part of learning helps, and how many
  evaluations it needs (`benchmarks.ablation`);
- ``report``: the table and, per sparsity, the plot of quality against total seconds for 1, 8, 64
  and 512 requests.

``python -m benchmarks.quality [PART …] [--seeds 5] [--processes 2] [--model …]``; files go to
``benchmarks/results/quality/``. ``--model wikitext`` trains a second model of another architecture
first, from WikiText-2 in ``../shared/data``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import ablation, report, tasks
from benchmarks.common import Bench
from benchmarks.jobs import kind_of, make_jobs, run_jobs
from benchmarks.ledger import Ledger, Setting
from benchmarks.second_model import SECOND, SMALLER, resolve
from unicuco.pipeline.contest import LEARNED, allocator_names

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
SEEDS = 5
ABLATION: dict[str, tuple[Callable[[Bench, int], None], int]] = {
    "ablation": (ablation.measure_ablation, 3),
    "presets": (ablation.measure_presets, 5),
    "evaluations": (ablation.measure_evaluations, 3),
}


def measure(
    setting: Setting, methods: Sequence[str], options: argparse.Namespace, *, with_tasks: bool
) -> None:
    """Measure allocators, all of them for one seed after the other, where results are missing.

    ``with_tasks``: also where tasks need a strategy that is not on this machine.
    """
    ledgers = {method: Ledger(setting, method, kind_of(method)) for method in methods}
    jobs = [
        job
        for seed in range(options.seeds or SEEDS)
        for method, ledger in ledgers.items()
        for job in make_jobs(setting, method, seed, options.sparsity)
        if not ledger.has(seed, job.sparsities) or (with_tasks and tasks.lack(job, options))
    ]
    started = time.perf_counter()
    for number, done in enumerate(run_jobs(jobs, options.processes), start=1):
        method = done.job.method
        if not ledgers[method].has(done.job.seed, done.job.sparsities):
            ledgers[method].add(done.records, done.once)
        where = ", ".join(f"{r.sparsity:g}: KL {r.kl:.4f}" for r in done.records)
        elapsed = time.perf_counter() - started
        print(
            f"{number}/{len(jobs)} seed {done.job.seed} {method} {where} ({elapsed:.0f} s)",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save and report."""
    methods = [LEARNED, *(name for name in allocator_names() if name != LEARNED)]
    parts = [*methods, "tasks", *ABLATION, "report"]
    options = _parser(parts).parse_args(arguments)
    unknown = [part for part in options.parts if part not in parts]
    if unknown:
        raise SystemExit(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    tasks.check_names(options.tasks)
    torch.set_num_threads(options.threads)
    resolve(options.model)  # trained where it is one of ours and not there yet
    setting = Setting(model=options.model, tokens=options.tokens, test_tokens=options.test_tokens)
    wanted = options.parts or parts
    measured = [method for method in methods if method in wanted]
    measure(setting, measured, options, with_tasks="tasks" in wanted)
    for part in wanted:
        if part == "tasks":
            tasks.measure(setting, methods, options)
        elif part == "report":
            report.report(setting, methods)
        elif part in ABLATION:
            run, seeds = ABLATION[part]
            bench = Bench(options.model, tokens=options.tokens, test_tokens=options.test_tokens)
            run(bench, options.seeds or seeds)


def _parser(parts: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure the quality of what is learned.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--model", default="reference", help=f"or {SECOND}, {SMALLER}, or a folder")
    parser.add_argument("--seeds", type=int, help="of every part; its own number if left out")
    parser.add_argument("--sparsity", type=_numbers, default=SPARSITIES, help="0.5,0.6,…")
    parser.add_argument("--processes", type=int, default=1, help="of one thread, side by side")
    parser.add_argument("--threads", type=int, default=1, help="of ablation and presets")
    parser.add_argument("--tokens", type=int, default=3072, help="of the search text")
    parser.add_argument("--test-tokens", type=int, default=16_384)
    parser.add_argument("--tasks", type=_names, default=("continuation", "hellaswag"))
    parser.add_argument("--items", type=int, default=200, help="of every task")
    return parser


def _numbers(words: str) -> tuple[float, ...]:
    return tuple(float(word) for word in words.split(","))


def _names(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(","))


if __name__ == "__main__":
    main()
