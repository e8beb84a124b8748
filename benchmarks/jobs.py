"""The jobs of the comparison: one method with one seed, at one sparsity or all of them.

A job runs in one thread of one process; several may run side by side in processes of their own.
Everything that costs evaluations is kept under ``out/benchmarks`` (ignored by git), so a job that
was killed goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.ledger import WORK, Once, Record, Setting
from benchmarks.second_model import resolve
from unicuco.allocate import ALLOCATORS
from unicuco.calibration import Sampling
from unicuco.models import load_tokenizer
from unicuco.pipeline import LearnOptions, LocalBackend, Run, learn
from unicuco.pipeline.contest import LEARNED, Answer, Contest
from unicuco.pipeline.judge import TestJudge, TestQuality
from unicuco.pipeline.preparation import prepare
from unicuco.pipeline.run import MANIFEST
from unicuco.pipeline.texts import test_windows
from unicuco.rows import RowRule
from unicuco.search import REQUEST_SEARCHES
from unicuco.search.drive import Pool
from unicuco.types import Strategy

EVOLUTION_UNITS = 300.0
# By this process, of any seed: drop orders and texts are the same for all.
_MEASURED: dict[Setting, dict[str, tuple[TestQuality, float]]] = {}
TRAINED_PER_REQUEST = ("besa", "lua")  # allocators that train anew for every target
ROWS_SUFFIX = ".safetensors"
_NEARBY = 0.003  # to time requests that were not asked before
_DENSE_UNITS = 1.0  # the dense model's pass over the search text


@dataclass(frozen=True, kw_only=True)
class Job:
    """A method with a seed at some sparsities; ``units`` limits a search (0: its own number)."""

    setting: Setting
    method: str
    seed: int
    sparsities: tuple[float, ...]
    units: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Done:
    """What came of a job."""

    job: Job
    records: list[Record]
    once: Once


def kind_of(method: str) -> str:
    """Return whether a method learns once, looks once, or searches or trains for every request."""
    if method == LEARNED:
        return "amortised"
    return "per request" if _is_per_request(method) else "one-shot"


def make_jobs(setting: Setting, method: str, seed: int, sparsities: Sequence[float]) -> list[Job]:
    """Return a method's jobs: searches get one per sparsity, so that each is recorded alone."""
    if not _is_per_request(method):
        return [Job(setting=setting, method=method, seed=seed, sparsities=tuple(sparsities))]
    units = max(EVOLUTION_UNITS, run_units(setting)) if method == "evopress" else 0.0
    return [
        Job(setting=setting, method=method, seed=seed, sparsities=(sparsity,), units=units)
        for sparsity in sparsities
    ]


def _is_per_request(method: str) -> bool:
    return method in REQUEST_SEARCHES or method in TRAINED_PER_REQUEST


def run_units(setting: Setting) -> float:
    """Return the most units that a learned run of this setting took; 0 where there is none yet."""
    manifests = WORK.glob(f"{setting.tag}/seed*/run/{MANIFEST}")
    return max((float(json.loads(p.read_text())["cost_units"]) for p in manifests), default=0.0)


def seed_folder(setting: Setting, seed: int) -> Path:
    """Return the folder with what one seed's evaluations and strategies are kept in."""
    return WORK / setting.tag / f"seed{seed}"


def strategy_file(setting: Setting, seed: int, method: str, sparsity: float) -> Path:
    """Return where a method's answer at a sparsity is kept."""
    return seed_folder(setting, seed) / "strategies" / f"{method}-{sparsity:g}.json"


def run_jobs(jobs: Sequence[Job], processes: int) -> Iterator[Done]:
    """Run jobs, several at a time if ``processes`` > 1, and yield each as it is done."""
    if processes <= 1:
        torch.set_num_threads(1)
        yield from map(run_job, jobs)
        return
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(run_job, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run_job(job: Job) -> Done:
    """Run one job in this process."""
    bench = arena(job.setting, job.seed)
    answers, once = bench.answers(job)
    records = [bench.record(job.seed, answer, seconds) for answer, seconds in answers]
    return Done(job=job, records=records, once=once)


class Arena:
    """One model prepared with one seed, its judges, and the folder that keeps its evaluations."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.folder = seed_folder(setting, seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        model = resolve(setting.model)
        self._options = LearnOptions(
            model=model.path,
            out=self.folder / "run",
            calibration=model.calibration,
            tokens=setting.tokens,
            seed=seed,
        )
        with TemporaryDirectory() as made:  # another process may prepare the same
            self.prepared = prepare(self._options, Path(made), lambda step: None)
        self._contest = Contest(self.prepared, self.folder, seed=seed, progress=lambda step: None)
        self._pools: dict[Sampling, Pool] = {}
        self._search_judge = TestJudge(self.prepared, self.prepared.texts.search)
        tokenizer = load_tokenizer(self.prepared.loaded.folder)
        test = test_windows(
            tokenizer, model.test, tokens=setting.test_tokens, context=self.prepared.context
        )
        self.tokenizer = tokenizer
        self.judge = TestJudge(self.prepared, test)
        self._setting = setting

    def answers(self, job: Job) -> tuple[list[tuple[Answer, float]], Once]:
        """Return a job's answers with the CPU seconds of each, and what it cost once."""
        prepared = Once(
            seed=job.seed,
            seconds=sum(cost.seconds for cost in self.prepared.costs),
            wall_s=sum(cost.seconds for cost in self.prepared.costs),
            units=_DENSE_UNITS + sum(cost.cost_units for cost in self.prepared.costs),
        )
        if job.method == LEARNED:
            run, once = self._learn(job.seed)
            with cpu_seconds() as elapsed:
                answers = self._contest.learned(run, job.sparsities)
            return _shared(answers, elapsed()), once
        if job.method in ALLOCATORS:
            with cpu_seconds() as elapsed:
                answers = self._contest.one_shot(job.method, job.sparsities)
            first = elapsed()
            if _is_per_request(job.method):
                return _shared(answers, first), prepared
            others = [sparsity + _NEARBY for sparsity in job.sparsities]
            with cpu_seconds() as elapsed:
                self._contest.one_shot(job.method, others)
            looked = max(0.0, first - elapsed())  # what later requests need not do again
            once = replace(
                prepared, seconds=prepared.seconds + looked, wall_s=prepared.wall_s + looked
            )
            return _shared(answers, elapsed()), once
        found = [self._search(job, sparsity) for sparsity in job.sparsities]
        costs = self._contest.sampling_costs(job.method)
        return found, replace(
            prepared,
            seconds=prepared.seconds + sum(cost.seconds for cost in costs),
            wall_s=prepared.wall_s + sum(cost.seconds for cost in costs),
            units=prepared.units + sum(cost.cost_units for cost in costs),
        )

    def record(self, seed: int, answer: Answer, seconds: float) -> Record:
        """Measure an answer on the test text and on the search text, and keep its strategy."""
        quality, search_kl = self._measure(answer.strategy, answer.rows)
        path = strategy_file(self._setting, seed, answer.allocator, answer.sparsity)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(answer.strategy.settings))
        if answer.rows is not None:
            answer.rows.save(path.with_suffix(ROWS_SUFFIX))
        return Record(
            seed=seed,
            sparsity=answer.sparsity,
            kl=quality.kl,
            perplexity=quality.perplexity,
            search_kl=search_kl,
            seconds=seconds,
            wall_s=answer.seconds,
            units=answer.units,
            evaluations=answer.evaluations,
            curve=[list(point) for point in answer.curve],
        )

    def _measure(self, strategy: Strategy, rows: RowRule | None) -> tuple[TestQuality, float]:
        key = strategy.key + ("" if rows is None else rows.digest)
        known = _MEASURED.setdefault(self._setting, {})
        if key not in known:
            search_kl = self._search_judge.measure(strategy, rows).kl
            known[key] = (self.judge.measure(strategy, rows), search_kl)
        return known[key]

    def _search(self, job: Job, sparsity: float) -> tuple[Answer, float]:
        database = self.folder / f"{job.method}-{sparsity:g}.db"
        resumed = database.exists()
        pool = self._pool(self._contest.sampling(job.method))
        with cpu_seconds() as elapsed:
            answer = self._contest.search(job.method, sparsity, pool, units=job.units or None)
        # Of a search that was cut off only the store knows the time, and that is wall time.
        return answer, answer.seconds if resumed else elapsed()

    def _pool(self, sampling: Sampling) -> Pool:
        """Return the evaluator on a search text; it is made once."""
        if sampling not in self._pools:
            text = self._contest.search_text(sampling)
            self._pools[sampling] = LocalBackend().start_pool(*self.prepared.judging(text))
        return self._pools[sampling]

    def _learn(self, seed: int) -> tuple[Run, Once]:
        """Learn the seed's one run, or open it; every table uses the same."""
        out, note = self._options.out, self.folder / "run-seconds.json"
        if not (out / MANIFEST).exists() or not note.exists():
            options = replace(self._options, resume=out.exists())
            started = time.perf_counter()
            with cpu_seconds() as elapsed:
                learn(options, backend=LocalBackend(), progress=lambda step: None)
            note.write_text(
                json.dumps({"seconds": elapsed(), "wall_s": time.perf_counter() - started})
            )
        run = Run.open(out)
        once = Once(
            seed=seed, units=float(run.manifest["cost_units"]), **json.loads(note.read_text())
        )
        return run, once


@lru_cache(maxsize=1)
def arena(setting: Setting, seed: int) -> Arena:
    """Return the arena of a setting and seed; the last one used is kept."""
    return Arena(setting, seed)


@contextmanager
def cpu_seconds() -> Iterator[Callable[[], float]]:
    """Yield a function that says how much CPU time this process used since, or inside."""
    started = time.process_time()
    ended: list[float] = []
    yield lambda: (ended[0] if ended else time.process_time()) - started
    ended.append(time.process_time())


def _shared(answers: list[Answer], seconds: float) -> list[tuple[Answer, float]]:
    return [(answer, seconds / len(answers)) for answer in answers]
