"""The process of `benchmarks.requests` for the methods of this project.

``stratnet`` learns a run first and answers from it; the others load, calibrate, decide and write
for every request. ``copy`` only copies the model's files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import careful_copy, unpredicted_plan
from benchmarks.request_tools.clock import Clock
from unicuco.allocate import ALLOCATORS, AllocationContext, AxisCurves, Evidence
from unicuco.calibration import TokenSet, collect_input_norms
from unicuco.dimensions import Granularity, build_space
from unicuco.export import write_variant
from unicuco.importance import METRICS
from unicuco.models import LoadedModel, load_model, load_tokenizer
from unicuco.pipeline import LearnOptions, LocalBackend, learn, prune
from unicuco.pipeline.contest import Contest
from unicuco.pipeline.preparation import prepare
from unicuco.pipeline.texts import LearningSource
from unicuco.ranks import RankStore, build_ranks
from unicuco.space import StrategySpace
from unicuco.types import Request, Strategy, Target

_SEARCH_UNITS = 300.0

Cut = Callable[[float, Path], object]


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer the task's targets and report."""
    torch.set_num_threads(1)
    path = Path((arguments or sys.argv[1:])[0])
    task = json.loads(path.read_text())
    out, model = Path(task["out"]), Path(task["model"])
    windows = TokenSet.from_ids(torch.tensor(task["windows"]))
    clock = Clock()
    with clock.learning():
        cut = _prepare(task["method"], model, out, task["tokens"], windows)
    for sparsity in task["targets"]:
        with clock.request():
            cut(sparsity, out / f"{sparsity:g}")
    clock.report(out / "report.json")


def _prepare(method: str, model: Path, out: Path, tokens: int, windows: TokenSet) -> Cut:
    """Do what a method does before its first request, and return what cuts for a sparsity."""
    if method == "stratnet":
        options = LearnOptions(model=str(model), out=out / "run", tokens=tokens)
        run = learn(options, backend=LocalBackend(), progress=lambda step: None)
        return lambda value, target: prune(
            run, Request(target=Target.SPARSITY, value=value), target
        )
    if method == "copy":
        return lambda _, target: copy(model, target)
    if method == "evopress":
        return partial(search, model, tokens)
    return partial(one_shot, model, method, windows)


def copy(model: Path, target: Path) -> None:
    """Copy a model's files."""
    target.mkdir()
    for file in sorted(model.iterdir()):
        careful_copy(file, target / file.name)


def one_shot(model: Path, method: str, windows: TokenSet, sparsity: float, target: Path) -> None:
    """Prune from scratch: ``wanda`` uniformly, or an allocator by its name."""
    loaded = load_model(model)
    norms = collect_input_norms(loaded.model, loaded.profile, windows)
    ranks = build_ranks(loaded.model, loaded.profile, METRICS["wanda"], norms)
    space = build_space(loaded.profile)
    name = "uniform" if method == "wanda" else method
    context = AllocationContext(
        space=space,
        curves=AxisCurves(torch.zeros(space.num_axes, 2)),  # these allocators know no curves
        evidence=Evidence(
            loaded=loaded,
            ranks=ranks,
            granularity=Granularity.LAYER,
            calibration=windows,
            texts=LearningSource(tokenizer=load_tokenizer(model), source=None, tasks=()),
            seed=0,
        ),
    )
    (strategy,) = ALLOCATORS[name](context).allocate([sparsity])
    write(loaded, ranks, space, strategy, sparsity, target)


def search(model: Path, tokens: int, sparsity: float, target: Path) -> None:
    """Prepare, search for one target and write."""
    folder = target.with_name(f"search-{sparsity:g}")
    folder.mkdir()
    options = LearnOptions(model=str(model), out=folder, tokens=tokens)
    prepared = prepare(options, folder, lambda step: None)
    contest = Contest(prepared, folder, seed=0, progress=lambda step: None)
    text = contest.search_text(contest.sampling("evopress"))
    pool = LocalBackend().start_pool(*prepared.judging(text))
    answer = contest.search("evopress", sparsity, pool, units=_SEARCH_UNITS)
    write(prepared.loaded, prepared.ranks, prepared.space, answer.strategy, sparsity, target)


def write(
    loaded: LoadedModel,
    ranks: RankStore,
    space: StrategySpace,
    strategy: Strategy,
    sparsity: float,
    target: Path,
) -> None:
    """Write a checkpoint as variants are written."""
    write_variant(
        target,
        base=loaded.folder,
        profile=loaded.profile,
        ranks=ranks,
        space=space,
        plan=unpredicted_plan(space, strategy, sparsity),
        provenance={"run": "", "seed": 0},
    )


if __name__ == "__main__":
    main()
