"""What learning needs before it can ask: the model, its texts, the drop order, Fisher curves.

Where sites come from a level database, the drop order still gives the Fisher curves their ranks;
the levels are planned here and built on the backend (`build_levels`).

Ranks and Fisher sums are written to the run folder as soon as they are there, so a resumed run
reads them back. Every pass over the model is counted in units (one forward pass over the search
text).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import torch
from torch import Tensor

from unicuco.allocate import AllocationContext, AxisCurves, Evidence, TextPart
from unicuco.calibration import Sampling, TokenSet, sample_clustered
from unicuco.dimensions import Granularity, build_space
from unicuco.errors import RunError
from unicuco.evaluate import EvaluatorConfig
from unicuco.evaluate.arrays import Arrays, pack_model
from unicuco.importance import METRICS
from unicuco.importance.hessian import collect_factors
from unicuco.importance.units import UnitStore, build_units
from unicuco.models import LoadedModel, load_tokenizer
from unicuco.models.weights import weight_source
from unicuco.pipeline import levelling
from unicuco.pipeline.backend import Backend
from unicuco.pipeline.dense import DenseModel, open_dense, pack_dense_text
from unicuco.pipeline.files import load_tensors, save_tensors
from unicuco.pipeline.options import LearnOptions, ProgressSink
from unicuco.pipeline.shrinking import check_shapes, factors_of, units_of
from unicuco.pipeline.texts import (
    LearningSource,
    LearningTexts,
    check_screening,
    learning_texts,
    task_texts,
    window_length,
)
from unicuco.pipeline.warming import take_prior
from unicuco.ranks import RankStore
from unicuco.search import SearchConfig
from unicuco.search.drive import Progress
from unicuco.shards.plan import check_shards
from unicuco.space import StrategySpace
from unicuco.store import Measurement
from unicuco.surrogate import Prior, SurrogateOptions
from unicuco.types import ModelProfile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

MIN_SPARSITY: Final = (
    0.05  # the lowest target that is learned; below it the answer for it is scaled down
)
_FISHER_UNITS: Final = 3.0  # a forward and a backward pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A model ready to be learned."""

    dense: DenseModel
    texts: LearningTexts
    source: LearningSource
    ranks: RankStore
    fisher: dict[str, Tensor]
    evaluator: EvaluatorConfig
    search: SearchConfig
    context: int
    costs: tuple[Measurement, ...]
    levels: levelling.Levels | None = None
    units: UnitStore | None = None
    factors: dict[str, Tensor] | None = None

    @property
    def loaded(self) -> LoadedModel:
        """The model; its weights only where it is whole."""
        return self.dense.loaded

    @property
    def space(self) -> StrategySpace:
        """The strategy space."""
        return self.search.space()

    def model_arrays(self) -> Arrays:
        """Return the model's arrays for evaluators."""
        return pack_model(
            self.dense.state(), self.ranks.ranks, self.fisher, self.units, self.factors
        )

    def text_arrays(self, text: TokenSet) -> Arrays:
        """Return a text's arrays for evaluators; runs the dense model once over it."""
        return pack_dense_text(self.dense, text)

    def judging(self, text: TokenSet) -> tuple[EvaluatorConfig, Arrays]:
        """Return what evaluators on a text are made of; runs the dense model once over it."""
        arrays = {**self.model_arrays(), **self.text_arrays(text)}
        return replace(self.evaluator, text_digest=text.digest), arrays

    def sampled_search_text(self, seed: int) -> tuple[TokenSet, Measurement]:
        """Draw as many windows as the search text has, by clusters, from all that it could have."""
        search = self.texts.search
        return _clustered(self.loaded, self.source, TextPart.SEARCH, search, search, seed=seed)


def build_levels(
    prepared: Prepared,
    backend: Backend,
    progress: ProgressSink,
    record: Callable[[Measurement], None] = lambda measurement: None,
) -> None:
    """Build what is missing of the levels on an entered backend; ``record`` what that cost."""
    if prepared.levels is None:
        return
    levelling.build(
        prepared.levels,
        prepared.evaluator.model_config,
        prepared.dense.state(),
        prepared.texts.calibration,
        prepared.texts.search.num_tokens,
        backend=backend,
        progress=progress,
        record=record,
    )


def allocation_context(prepared: Prepared) -> AllocationContext:
    """Return what allocators may look at, evidence of the model included."""
    return AllocationContext(
        space=prepared.space,
        curves=prepared.search.axis_curves(),
        evidence=Evidence(
            loaded=prepared.loaded,
            ranks=prepared.ranks,
            granularity=prepared.search.granularity,
            calibration=prepared.texts.calibration,
            texts=prepared.source,
            seed=prepared.search.seed,
        ),
    )


def prepare(
    options: LearnOptions,
    folder: Path,
    progress: ProgressSink,
    *,
    check: Callable[[str, str], None] = lambda model_digest, data_digest: None,
) -> Prepared:
    """Load the model and texts, and build or read back ranks and Fisher sums.

    Args:
        options: of the run.
        folder: the run folder, which exists.
        progress: told of every stage.
        check: given the digests of model and texts before anything is made or read back; raises
            where the folder belongs to others.

    Raises:
        RequestError: more shards than the model has blocks, or nothing saved by screening.
        StorageError: the disk hasn't room for the levels.
        VariantError: variants of these dimensions could not be written of this model.
    """
    progress(Progress(stage="load", done=0, total=1, detail=options.model))
    with open_dense(options.model, folder, whole=options.shards == 1) as dense:
        return _prepare(options, folder, dense, progress, check)


def _prepare(
    options: LearnOptions,
    folder: Path,
    dense: DenseModel,
    progress: ProgressSink,
    check: Callable[[str, str], None],
) -> Prepared:
    loaded = dense.loaded
    check_shards(options.shards, loaded.profile.num_blocks)
    check_shapes(options, loaded)
    tokenizer = load_tokenizer(loaded.folder)
    context = window_length(loaded.profile.max_context, options.context)
    texts = read_texts(options, tokenizer, context)
    check_screening(texts.search, options.screen_tokens)
    source = LearningSource(tokenizer=tokenizer, source=options.calibration, tasks=options.tasks)
    costs: list[Measurement] = []
    if options.calibration_sampling == Sampling.CLUSTERED:
        chosen, cost = _clustered(
            loaded,
            source,
            TextPart.CALIBRATION,
            texts.calibration,
            texts.search,
            seed=options.seed,
        )
        texts = replace(texts, calibration=chosen)
        costs.append(cost)
    progress(Progress(stage="load", done=1, total=1))
    check(loaded.profile.digest, texts.digest)
    space = build_space(loaded.profile, options.dimensions, Granularity(options.granularity))
    prior = take_prior(options, space) if options.warm_from else None
    levels = levelling.plan_levels(options.pruner, loaded, texts.calibration, folder)
    if levels is not None:
        levelling.announce(levels, progress)
        levels.check_room()
    ranks = _ranks(options, folder, dense, texts, costs, progress)
    fisher = _fisher(options, folder, dense, texts, ranks, costs, progress)
    inside_heads = "low_rank" in options.dimensions
    units = units_of(
        options,
        folder,
        lambda: _counted(
            lambda: build_units(loaded, texts.calibration, inside_heads=inside_heads),
            "units",
            1.0 + inside_heads,
            texts,
            costs,
        ),
        progress,
    )
    factors = factors_of(
        options,
        folder,
        lambda: _counted(
            lambda: collect_factors(loaded, texts.calibration),
            "factors",
            float(loaded.profile.num_blocks),
            texts,
            costs,
        ),
        progress,
    )
    return Prepared(
        dense=dense,
        texts=texts,
        source=source,
        ranks=ranks,
        fisher={site.path: fisher[site.path] for site in loaded.profile.sites},
        context=context,
        costs=tuple(costs),
        levels=levels,
        units=units,
        factors=factors,
        evaluator=EvaluatorConfig(
            model_config=loaded.model.config.to_json_string(),
            profile=loaded.profile,
            dimensions=options.dimensions,
            granularity=Granularity(options.granularity),
            text_digest=texts.search.digest,
            levels="" if levels is None else str(levels.folder.resolve()),
            tasks=options.task_names,
            weights=weight_source(loaded.folder),
        ),
        search=_search_config(options, space, loaded.profile, fisher, levels, prior),
    )


def read_texts(
    options: LearnOptions, tokenizer: PreTrainedTokenizerBase, context: int
) -> LearningTexts:
    """Return the three texts that the options name, ``context`` tokens per window, spread evenly.

    Raises:
        TextError: a text can't be read or is too short.
    """
    if options.tasks:
        return task_texts(tokenizer, options.tasks, tokens=options.tokens, context=context)
    return learning_texts(tokenizer, options.calibration, tokens=options.tokens, context=context)


def _search_config(
    options: LearnOptions,
    space: StrategySpace,
    profile: ModelProfile,
    fisher: dict[str, Tensor],
    levels: levelling.Levels | None,
    prior: Prior | None,
) -> SearchConfig:
    granularity = Granularity(options.granularity)

    def curves(sums: dict[str, Tensor]) -> Tensor:
        return AxisCurves.from_fisher(space, profile, granularity, sums).table

    return SearchConfig(
        preset=options.preset,
        profile=profile,
        dimensions=options.dimensions,
        granularity=granularity,
        curves=curves(fisher),
        sparsity_range=(MIN_SPARSITY, min(options.max_sparsity, space.highest_sparsity)),
        seed=options.seed,
        surrogate=SurrogateOptions() if levels is None else SurrogateOptions(directions=0),
        level_step=0 if levels is None else levels.plan.step,
        round_size=options.round_size or 0,
        screen_tokens=options.screen_tokens or 0,
        prior=prior,
        tasks=options.task_names,
        task_curves=tuple(
            curves({site.path: fisher[_of_task(k, site.path)] for site in profile.sites})
            for k in range(len(options.tasks))
        ),
    )


def _clustered(
    loaded: LoadedModel,
    source: LearningSource,
    part: TextPart,
    even: TokenSet,
    search: TokenSet,
    *,
    seed: int,
) -> tuple[TokenSet, Measurement]:
    """Draw the windows of a text anew, by groups, from all windows that it could have.

    Returns:
        As many windows as ``even``, and what finding their groups cost: one pass over all of them,
        in passes over the ``search`` text.
    """
    started = time.perf_counter()
    pool = source.pool(part, context=even.context)
    chosen = sample_clustered(loaded.model, pool, len(even.ids), seed=seed)
    return chosen, Measurement(
        purpose="sampling",
        tokens=pool.num_tokens,
        cost_units=pool.num_tokens / search.num_tokens,
        seconds=time.perf_counter() - started,
        text_digest=pool.digest,
    )


def _ranks(
    options: LearnOptions,
    folder: Path,
    dense: DenseModel,
    texts: LearningTexts,
    costs: list[Measurement],
    progress: ProgressSink,
) -> RankStore:
    if options.resume and (folder / "ranks").is_dir():
        return RankStore.load(folder / "ranks")
    progress(Progress(stage="rank", done=0, total=1, detail=options.metric))

    def build() -> RankStore:
        return dense.build_ranks(METRICS[options.metric], texts.calibration)

    ranks = _counted(build, "calibration", 1.0, texts, costs)
    ranks.save(folder / "ranks")
    progress(Progress(stage="rank", done=1, total=1))
    # The files are mapped: what nobody looks at takes no memory.
    return ranks if options.shards == 1 else RankStore.load(folder / "ranks")


def _fisher(
    options: LearnOptions,
    folder: Path,
    dense: DenseModel,
    texts: LearningTexts,
    ranks: RankStore,
    costs: list[Measurement],
    progress: ProgressSink,
) -> dict[str, Tensor]:
    path = folder / "fisher.safetensors"
    if options.resume and path.is_file():
        return _checked(path, load_tensors(path), dense.loaded.profile)
    progress(Progress(stage="fisher", done=0, total=1))

    def build() -> dict[str, Tensor]:
        def sums(windows: TokenSet) -> dict[str, Tensor]:
            return dense.fisher_rank_sums(ranks.ranks, windows, seed=options.seed)

        parts = texts.calibration.ids.chunk(max(1, len(options.tasks)))
        if len(parts) == 1:
            return sums(texts.calibration)
        each = [sums(TokenSet.from_ids(part)) for part in parts]
        both = {path: torch.stack([own[path] for own in each]).mean(0) for path in each[0]}
        return both | {_of_task(k, path): own[path] for k, own in enumerate(each) for path in own}

    sums = _counted(build, "fisher", _FISHER_UNITS, texts, costs)
    save_tensors(path, sums)
    progress(Progress(stage="fisher", done=1, total=1))
    return sums


def _checked(path: Path, sums: dict[str, Tensor], profile: ModelProfile) -> dict[str, Tensor]:
    for site in profile.sites:
        if site.path not in sums or sums[site.path].shape != (site.num_columns,):
            raise RunError(
                f"{path} does not hold the Fisher sums of {site.path}; remove it, and --resume "
                "makes it again"
            )
    return sums


def _of_task(number: int, path: str) -> str:
    return f"task{number}/{path}"


def _counted(
    work: Callable[[], T],
    purpose: str,
    units_per_pass: float,
    texts: LearningTexts,
    costs: list[Measurement],
) -> T:
    started = time.perf_counter()
    result = work()
    calibration = texts.calibration
    costs.append(
        Measurement(
            purpose=purpose,
            tokens=calibration.num_tokens,
            cost_units=units_per_pass * calibration.num_tokens / texts.search.num_tokens,
            seconds=time.perf_counter() - started,
            text_digest=calibration.digest,
        )
    )
    return result
