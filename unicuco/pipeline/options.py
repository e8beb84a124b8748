"""What a user decides about learning, checked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from unicuco.calibration import Sampling
from unicuco.dimensions import DIMENSIONS, Granularity, check_dimensions, follow_slopes
from unicuco.dimensions.sparsity import MAX_SITE_SPARSITY
from unicuco.errors import RequestError
from unicuco.importance import METRICS
from unicuco.pruners import LEVEL_PRUNERS
from unicuco.search import SEARCHES
from unicuco.search.drive import Progress
from unicuco.types import ServedAs

ProgressSink = Callable[[Progress], None]

# With derivatives, KL on test text falls no further after seven rounds of three on the reference
# model (`python -m benchmarks.quality evaluations`): 21 evaluations at 3 units, and 28 units of
# preparation and validation, are 91. Levels, removed parts and bits are learned from values alone
# and need more. The published preset spends 110 on values (PAPERS.md, section 1b).
DEFAULT_EVALUATIONS: Final = {"default": 21, "paper": 110}
_EVALUATIONS_OF_VALUES: Final = 81
ROUNDINGS: Final = ("nearest", "gptq")  # of weight_bits
MIN_EVALUATIONS: Final = 4
_TASK_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnOptions:
    """Options of ``unicuco learn``; the same names in the cluster's YAML.

    ``out`` is the folder to learn in, and ``publish_to`` the URL where the run shall lie, or empty;
    ``store`` is the URL of a database of the run's own that records it, or empty for a file in
    ``out``;
    ``pruner`` is a metric of the drop order, or sparsegpt, whose sites come from a level database;
    ``evaluations`` is the total number of strategies asked (none: the preset's default); ``tokens``
    are tokens per evaluation; ``shards`` are the actors that each replica's blocks are spread over;
    ``round_size`` strategies are asked before what they say is learned from (none: the preset's
    own): at most two rounds are under way, so more replicas want larger ones;
    ``screen_tokens`` of the search text judge alternatives, of which the best is evaluated on
    ``tokens`` (none: there are no alternatives);
    ``context`` tokens per window (none: the model's own, at most 512);
    ``rounding`` how weights get fewer bits: to the nearest, or by GPTQ;
    ``calibration_sampling`` how calibration windows are chosen from their text;
    ``tasks`` are names and texts that requests may weigh, each a share of every text, in place of
    ``calibration``; ``warm_from`` is another run, a folder or URL, that this one starts from, or
    empty; ``max_sparsity`` the highest sparsity over sites that is learned.

    Raises:
        RequestError: an option outside its range, or an unknown name.
    """

    model: str
    out: Path
    pruner: str = "wanda"
    granularity: str = "layer"
    dimensions: tuple[str, ...] = ("sparsity",)
    preset: str = "default"
    evaluations: int | None = None
    round_size: int | None = None
    screen_tokens: int | None = None
    replicas: int = 1
    shards: int = 1
    calibration: Path | None = None
    calibration_sampling: str = "even"
    tasks: tuple[tuple[str, Path], ...] = ()
    tokens: int = 3072
    context: int | None = None
    seed: int = 0
    rounding: str = "nearest"
    resume: bool = False
    warm_from: str = ""
    max_sparsity: float = 0.9
    publish_to: str = ""
    store: str = ""

    def __post_init__(self) -> None:
        _one_of("pruner", self.pruner, [*METRICS, *LEVEL_PRUNERS])
        _one_of("granularity", self.granularity, Granularity)
        _one_of("preset", self.preset, SEARCHES)
        _one_of("calibration-sampling", self.calibration_sampling, Sampling)
        check_dimensions(self.dimensions)
        if not self.masks_only and (self.has_levels or self.tasks):
            what = f"pruner {self.pruner}" if self.has_levels else "task"
            raise RequestError(
                f"{what} goes with the dimension sparsity alone in this version; "
                "give --dimensions sparsity"
            )
        if self.shards > 1 and self.has_levels:
            raise RequestError(
                f"pruner {self.pruner} builds levels of whole models: shards must be 1"
            )
        if self.shards > 1 and not self.masks_only:
            raise RequestError(
                "shards judge the dimension sparsity alone, no shapes or bits: shards must be 1"
            )
        if self.shards > 1 and self.calibration_sampling != Sampling.EVEN:
            raise RequestError("clustered sampling embeds text by a whole model: shards must be 1")
        self._check_tasks()
        _one_of("rounding", self.rounding, ROUNDINGS)
        if self.rounding != "nearest" and "weight_bits" not in self.dimensions:
            raise RequestError("rounding is of weight_bits; add it to --dimensions")
        _at_least("evaluations", self.num_evaluations, MIN_EVALUATIONS)
        _at_least("round-size", 1 if self.round_size is None else self.round_size, 1)
        if self.round_size is not None and (self.preset != "default" or not self.masks_only):
            raise RequestError(
                "round-size is for preset default and the dimension sparsity; leave it out"
            )
        self._check_screening()
        if self.warm_from and (self.preset != "default" or not self.masks_only or self.tasks):
            raise RequestError(
                "warm-from is for preset default and the dimension sparsity, without tasks; "
                "leave it out"
            )
        _at_least("replicas", self.replicas, 1)
        _at_least("shards", self.shards, 1)
        _at_least("tokens", self.tokens, 2)
        _at_least("context", 2 if self.context is None else self.context, 2)
        _at_least("seed", self.seed, 0)
        if not 0.1 < self.max_sparsity <= MAX_SITE_SPARSITY - 0.02:
            raise RequestError(
                f"max-sparsity must be in (0.1, {MAX_SITE_SPARSITY - 0.02:g}], "
                f"got {self.max_sparsity:g}"
            )

    def _check_screening(self) -> None:
        if self.screen_tokens is None:
            return
        _at_least("screen-tokens", self.screen_tokens, 1)
        if self.screen_tokens >= self.tokens:
            raise RequestError(
                f"screen-tokens must be below tokens ({self.tokens}), got {self.screen_tokens}"
            )
        if self.preset != "default" or not self.masks_only or self.tasks:
            raise RequestError(
                "screen-tokens is for preset default and the dimension sparsity, without tasks; "
                "leave it out"
            )

    def _check_tasks(self) -> None:
        if not self.tasks:
            return
        names = self.task_names
        if len(names) < 2 or len(set(names)) < len(names):
            raise RequestError(
                "task needs two texts or more, each under a name of its own; "
                f"got {', '.join(names)}"
            )
        if self.calibration is not None:
            raise RequestError("give either calibration or task, not both: tasks bring their texts")
        if self.preset != "default":
            raise RequestError(f"tasks are learned by preset default, not by {self.preset}")
        if self.calibration_sampling != Sampling.EVEN:
            raise RequestError("tasks share the calibration text evenly: sampling must be even")
        _at_least("tokens", self.tokens, 2 * len(names))

    @property
    def place(self) -> str:
        """Where the run lies, for messages."""
        return self.publish_to or str(self.out)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks' names in order; none where there is one text."""
        return tuple(name for name, _ in self.tasks)

    @property
    def masks_only(self) -> bool:
        """Whether variants are masks: neither smaller shapes nor fewer bits."""
        return all(DIMENSIONS[name].served_as is ServedAs.MASK for name in self.dimensions)

    @property
    def num_evaluations(self) -> int:
        """Strategies to ask in all."""
        if self.evaluations is not None:
            return self.evaluations
        knows_values_only = self.has_levels or not follow_slopes(self.dimensions)
        if self.preset == "default" and knows_values_only:
            return _EVALUATIONS_OF_VALUES
        return DEFAULT_EVALUATIONS[self.preset]

    @property
    def has_levels(self) -> bool:
        """Whether sites come from a level database."""
        return self.pruner in LEVEL_PRUNERS

    @property
    def metric(self) -> str:
        """The metric of the drop order; beside levels, that of the Fisher curves alone."""
        return "wanda" if self.has_levels else self.pruner

    def decisive(self) -> dict[str, object]:
        """Return what decides which strategies are asked and what they measure.

        A resumed run must agree on it.
        """
        # Defaults go unnamed, so that runs from before there was a choice can go on.
        sampling = self.calibration_sampling
        chosen: dict[str, object] = {}
        if sampling != Sampling.EVEN:
            chosen["calibration_sampling"] = sampling
        if self.round_size is not None:
            chosen["round_size"] = self.round_size
        if self.screen_tokens is not None:
            chosen["screen_tokens"] = self.screen_tokens
        if self.rounding != "nearest":
            chosen["rounding"] = self.rounding
        if self.warm_from:
            chosen["warm_from"] = self.warm_from
        if self.tasks:
            chosen["tasks"] = list(self.task_names)
        return {
            "pruner": self.pruner,
            "granularity": self.granularity,
            "dimensions": list(self.dimensions),
            "preset": self.preset,
            "tokens": self.tokens,
            "context": self.context,
            "seed": self.seed,
            "max_sparsity": self.max_sparsity,
            **chosen,
        }


def parse_tasks(given: Sequence[str]) -> tuple[tuple[str, Path], ...]:
    """Read ``NAME=FILE`` for every task.

    Raises:
        RequestError: no name or no file.
    """
    tasks = []
    for item in given:
        name, separator, file = item.partition("=")
        if not (separator and _TASK_NAME.fullmatch(name) and file):
            raise RequestError(
                f"task must be NAME=FILE, the name of small letters, digits, - and _; got {item!r}"
            )
        tasks.append((name, Path(file)))
    return tuple(tasks)


def _one_of(option: str, value: str, known: object) -> None:
    names = [str(name) for name in known]  # type: ignore[attr-defined]  # dicts and enums alike
    if value not in names:
        raise RequestError(f"{option} must be one of {', '.join(names)}; got {value!r}")


def _at_least(option: str, value: int, bound: int) -> None:
    if value < bound:
        raise RequestError(f"{option} must be at least {bound}, got {value}")
