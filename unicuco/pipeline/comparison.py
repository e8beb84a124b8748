"""`compare`: every named allocator at equal budgets, measured on text that nothing learned from.

All of them work on one model, one drop order, one calibration and one search text. What costs
evaluations keeps them in stores under one folder, so a comparison that was cut off goes on from
there. What it does not know: how results are shown.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from unicuco.allocate import ALLOCATORS
from unicuco.calibration import TokenSet
from unicuco.errors import RequestError, RunError, StorageError
from unicuco.importance import METRICS
from unicuco.models import load_tokenizer
from unicuco.pipeline.backend import Backend
from unicuco.pipeline.contest import LEARNED, Answer, Contest, allocator_names
from unicuco.pipeline.files import load_json, save_json
from unicuco.pipeline.judge import TestJudge
from unicuco.pipeline.learning import learn
from unicuco.pipeline.options import LearnOptions, ProgressSink
from unicuco.pipeline.preparation import Prepared, build_levels, prepare
from unicuco.pipeline.run import MANIFEST, Run
from unicuco.pipeline.texts import test_windows
from unicuco.pruners import LEVEL_PRUNERS
from unicuco.search import REQUEST_SEARCHES
from unicuco.search.drive import Progress

DEFAULT_TEST_TOKENS: Final = 16_384  # what the README's tables are measured on
_IDENTITY: Final = "comparison.json"
_RUN_OPTIONS: Final = ("pruner", "granularity", "context", "preset", "max_sparsity")
_NEEDS_RANKS: Final = {
    "trim": "spreads drops over rows",
    "lua": "spreads drops over rows",
    "descent": "needs derivatives",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """Options of ``unicuco compare``.

    ``run`` is what StratNet answers from (none: one is learned); ``out`` a folder that keeps what
    is measured (none: a temporary one); ``text`` the test text (none: the reference corpus');
    ``tokens`` per evaluation of a search; ``test_tokens`` at most so many of the test text;
    ``pruner`` what cuts for all of them (none: the run's own, or wanda).

    Raises:
        RequestError: unknown or repeated names, or numbers outside their range.
    """

    model: str
    allocators: tuple[str, ...]
    sparsities: tuple[float, ...]
    run: Path | None = None
    out: Path | None = None
    text: Path | None = None
    calibration: Path | None = None
    tokens: int = 3072
    test_tokens: int = DEFAULT_TEST_TOKENS
    seed: int = 0
    pruner: str | None = None

    def __post_init__(self) -> None:
        pruners = [*METRICS, *LEVEL_PRUNERS]
        if self.pruner is not None and self.pruner not in pruners:
            raise RequestError(f"pruner must be one of {', '.join(pruners)}; got {self.pruner!r}")
        known = allocator_names()
        for name in self.allocators:
            if name not in known:
                raise RequestError(f"allocators must be among {', '.join(known)}; got {name!r}")
        for sparsity in self.sparsities:
            if not 0 <= sparsity < 1:
                raise RequestError(f"sparsity must be in [0, 1), got {sparsity:g}")
        for what, values in (("allocators", self.allocators), ("sparsity", self.sparsities)):
            if not values or len(set(values)) != len(values):
                raise RequestError(f"{what} needs values, each once, with commas between")
        for what, number, least in (
            ("tokens", self.tokens, 2),
            ("test-tokens", self.test_tokens, 2),
            ("seed", self.seed, 0),
        ):
            if number < least:
                raise RequestError(f"{what} must be at least {least}, got {number}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One allocator at one sparsity.

    ``kl`` in nats per token and ``perplexity`` on the test text; ``seconds_per_request`` without
    what was learned or prepared once; ``evaluations`` of strategies that the answer rests on, for
    StratNet those of its run, which serve every request.
    """

    allocator: str
    sparsity: float
    kl: float
    perplexity: float
    seconds_per_request: float
    evaluations: int
    seed: int

    def to_dict(self) -> dict[str, object]:
        """Return the entry of the JSON document."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareReport:
    """All results, allocators in the order asked, and how they were measured.

    ``learned_s`` is what learning StratNet's run took here; none: nothing was learned.
    """

    results: tuple[Comparison, ...]
    test_tokens: int
    search_tokens: int
    learned_s: float | None

    def to_dict(self) -> dict[str, object]:
        """Return the JSON document."""
        return {"results": [result.to_dict() for result in self.results]}


def compare(
    options: CompareOptions, *, backend_factory: Callable[[], Backend], progress: ProgressSink
) -> CompareReport:
    """Compare allocators.

    Args:
        options: what to compare, on what.
        backend_factory: makes the backend that evaluates, if anything is searched or learned.
        progress: told of every stage.

    Raises:
        InfeasibleRequestError: a sparsity beyond what the model's space or the run reaches.
        UnicucoError: model, texts, run, storage or cluster refuse.
    """
    with _work_folder(options.out) as folder:
        run = None if options.run is None else Run.open(options.run, base=options.model)
        prepared = _prepared(options, folder, run, progress)
        if prepared.levels is not None and prepared.levels.missing_blocks():
            with backend_factory() as backend:
                build_levels(prepared, backend, progress)
        judge = TestJudge(prepared, _test_text(options, prepared))
        entrants = _Entrants(options, prepared, folder, backend_factory, progress)
        answers = entrants.answers(run)
        results = []
        for done, answer in enumerate(answers):
            progress(Progress(stage="measure", done=done, total=len(answers)))
            results.append(_result(options, answer, judge, entrants.run_evaluations))
        progress(Progress(stage="measure", done=len(answers), total=len(answers)))
    return CompareReport(
        results=tuple(results),
        test_tokens=judge.num_tokens,
        search_tokens=prepared.texts.search.num_tokens,
        learned_s=entrants.learned_s,
    )


class _Entrants:
    """Has every allocator answer; starts a backend and learns a run only where that is needed."""

    def __init__(
        self,
        options: CompareOptions,
        prepared: Prepared,
        folder: Path,
        backend_factory: Callable[[], Backend],
        progress: ProgressSink,
    ) -> None:
        self._options = options
        self._prepared = prepared
        self._folder = folder
        self._backend_factory = backend_factory
        self._progress = progress
        self._contest = Contest(prepared, folder, seed=options.seed, progress=progress)
        self.learned_s: float | None = None
        self.run_evaluations = 0

    def answers(self, run: Run | None) -> list[Answer]:
        """Return the answers of all allocators, in the order asked."""
        found: dict[str, list[Answer]] = {}
        sparsities = self._options.sparsities
        for name in self._options.allocators:  # what takes seconds, and refuses, goes first
            if name in ALLOCATORS:
                found[name] = self._contest.one_shot(name, sparsities)
        if LEARNED in self._options.allocators:
            run = run or self._learn()
            self.run_evaluations = int(run.manifest["evaluations"])
            found[LEARNED] = self._contest.learned(run, sparsities)
        searches = [name for name in self._options.allocators if name in REQUEST_SEARCHES]
        if searches:
            found |= self._search(searches)
        return [answer for name in self._options.allocators for answer in found[name]]

    def _search(self, names: list[str]) -> dict[str, list[Answer]]:
        contest, found = self._contest, dict[str, list[Answer]]()
        for sampling in dict.fromkeys(map(contest.sampling, names)):
            with self._backend_factory() as backend:
                text = contest.search_text(sampling)
                pool = backend.start_pool(*self._prepared.judging(text))
                for name in names:
                    if contest.sampling(name) is sampling:
                        found[name] = [
                            contest.search(name, sparsity, pool)
                            for sparsity in self._options.sparsities
                        ]
        return found

    def _learn(self) -> Run:
        options, out = self._options, self._folder / "run"
        if (out / MANIFEST).exists():
            return Run.open(out, base=options.model)
        started = time.perf_counter()
        run = learn(
            LearnOptions(
                model=options.model,
                out=out,
                pruner=options.pruner or "wanda",
                calibration=options.calibration,
                tokens=options.tokens,
                seed=options.seed,
                resume=(out / "evaluations.db").exists(),
            ),
            backend=self._backend_factory(),
            progress=self._progress,
        )
        self.learned_s = time.perf_counter() - started
        return run


def _prepared(
    options: CompareOptions, folder: Path, run: Run | None, progress: ProgressSink
) -> Prepared:
    """Prepare the model as its run was prepared, or into the folder of this comparison."""
    learn_options = LearnOptions(
        model=options.model,
        out=folder / "prepared",
        pruner=options.pruner or "wanda",
        calibration=options.calibration,
        tokens=options.tokens,
        seed=options.seed,
        resume=True,
    )
    if run is not None:
        recorded = {name: run.manifest["options"][name] for name in _RUN_OPTIONS}
        learn_options = replace(learn_options, out=run.folder, **recorded)
        if options.pruner not in (None, learn_options.pruner):
            raise RequestError(
                f"{run.folder} was learned with --pruner {learn_options.pruner}, not "
                f"{options.pruner}: leave --pruner out, or name another run"
            )
    _check_pruner(options, learn_options)

    def check(model_digest: str, data_digest: str) -> None:
        if run is not None and run.profile.digest != model_digest:
            raise RunError(f"{run.folder} is a run of another model than {options.model}")
        identity: dict[str, object] = {
            "base_model": model_digest,
            "data": data_digest,
            "pruner": learn_options.pruner,
        }
        _check_identity(options, folder, identity)

    if run is None:
        learn_options.out.mkdir(exist_ok=True)
    return prepare(learn_options, learn_options.out, progress, check=check)


def _check_pruner(options: CompareOptions, learn_options: LearnOptions) -> None:
    """Refuse allocators that can't work on levels."""
    if not learn_options.has_levels:
        return
    for name in options.allocators:
        if name in _NEEDS_RANKS:
            raise RequestError(
                f"{name} {_NEEDS_RANKS[name]}, which levels of {learn_options.pruner} don't "
                "have; leave it out"
            )


def _check_identity(options: CompareOptions, folder: Path, identity: dict[str, object]) -> None:
    """Refuse to go on in a folder that holds a comparison on another model or text."""
    path = folder / _IDENTITY
    identity |= {"seed": options.seed, "tokens": options.tokens}
    if path.exists():
        # Comparisons from before there was a choice name no pruner.
        recorded = {"pruner": "wanda", **load_json(path)}
        differing = [name for name, value in identity.items() if recorded.get(name) != value]
        if differing:
            raise RunError(
                f"{folder} holds a comparison with another {' and '.join(differing)};"
                " choose another folder"
            )
    save_json(path, identity)


def _test_text(options: CompareOptions, prepared: Prepared) -> TokenSet:
    """Return windows of the test text: all of it, or as many tokens as are wanted."""
    tokenizer = load_tokenizer(prepared.loaded.folder)
    context = prepared.context
    windows = test_windows(tokenizer, options.text, tokens=None, context=context)
    if windows.num_tokens > options.test_tokens:
        windows = test_windows(tokenizer, options.text, tokens=options.test_tokens, context=context)
    return windows


def _result(
    options: CompareOptions, answer: Answer, judge: TestJudge, run_evaluations: int
) -> Comparison:
    quality = judge.measure(answer.strategy, answer.rows)
    return Comparison(
        allocator=answer.allocator,
        sparsity=answer.sparsity,
        kl=quality.kl,
        perplexity=quality.perplexity,
        seconds_per_request=answer.seconds,
        evaluations=run_evaluations if answer.allocator == LEARNED else answer.evaluations,
        seed=options.seed,
    )


@contextmanager
def _work_folder(out: Path | None) -> Iterator[Path]:
    """Yield the folder of a comparison: the one named, or a temporary one that goes again.

    A folder that was made for a comparison that could not begin goes again too.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="unicuco-compare-") as folder:
            yield Path(folder)
        return
    if out.exists() and not (out / _IDENTITY).exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is not empty and holds no comparison; choose another folder")
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out} can't be made: {error.strerror or error}") from error
    try:
        yield out
    except BaseException:
        if made and not (out / _IDENTITY).exists():
            shutil.rmtree(out, ignore_errors=True)
        raise
