"""The value objects that cross every boundary: frozen, keyword-only, picklable, free of torch.

They check themselves at construction and are trusted afterwards. What they do not know: models,
budgets and files; `StrategySpace` turns settings into counts, and the run turns requests into
strategies.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final

from unicuco.errors import RequestError


class Target(StrEnum):
    """What a request bounds. Exactly one per request."""

    SPARSITY = "sparsity"
    MAX_PARAMS = "max_params"
    MAX_BYTES = "max_bytes"
    MAX_TOTAL_BYTES = "max_total_bytes"
    MAX_PACKED_BYTES = "max_packed_bytes"
    MAX_KL = "max_kl"
    MAX_LATENCY_MS = "max_latency_ms"
    PREFERENCE = "preference"


class ServedAs(StrEnum):
    """How a variant is stored: zeros in place, smaller shapes, or fewer bits."""

    MASK = "mask"
    SHRINK = "shrink"
    QUANTISED = "quantised"


_QUALIFIERS: Final = ("served_as", "task_weights", "context", "batch")
_COUNTED_BY: Final = {  # qualifier -> the targets that it goes with
    "context": (Target.MAX_TOTAL_BYTES,),
    "batch": (Target.MAX_TOTAL_BYTES, Target.MAX_LATENCY_MS),
}
_WEIGHT_SLACK: Final = 1e-6  # of the sum of task weights: what decimals on paper add up to
_WHOLE: Final = (
    Target.MAX_PARAMS,
    Target.MAX_BYTES,
    Target.MAX_TOTAL_BYTES,
    Target.MAX_PACKED_BYTES,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks: one target, its value, and how the variant may be served (none: any way).

    Ranges: sparsity in [0, 1); max_params and all bytes whole numbers > 0; max_kl in nats per
    token, >= 0; max_latency_ms in milliseconds per token while decoding, > 0; preference in [0, 1],
    0 = quality only, 1 = size only. ``task_weights``, pairs of a task's name and its weight >= 0
    with sum 1, say what KL means: the weighted one (none: all of the run's tasks equally).
    ``context`` tokens (none: the model's) of ``batch`` sequences (none: one) are those whose keys
    and values max_total_bytes counts. With max_latency_ms, ``batch`` sequences are decoded at a
    time (none: the fewest that were measured).

    Raises:
        RequestError: the value lies outside its range.
    """

    target: Target
    value: float
    served_as: ServedAs | None = None
    task_weights: tuple[tuple[str, float], ...] | None = None
    context: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        for qualifier, given in (("context", self.context), ("batch", self.batch)):
            if given is None:
                continue
            if self.target not in _COUNTED_BY[qualifier]:
                targets = " or ".join(_COUNTED_BY[qualifier])
                raise RequestError(f"{qualifier} goes with {targets}, not with {self.target}")
            if given < 1:
                raise RequestError(f"{qualifier} must be a whole number above 0, got {given}")
        if self.task_weights is not None:
            _check_weights(dict(self.task_weights))
        v = self.value
        name = self.target.value
        if not math.isfinite(v):
            raise RequestError(f"{name} must be a finite number, got {v}")
        if self.target is Target.SPARSITY and not 0 <= v < 1:
            raise RequestError(f"sparsity must be in [0, 1), got {v:g}")
        if self.target is Target.PREFERENCE and not 0 <= v <= 1:
            raise RequestError(f"preference must be in [0, 1], got {v:g}")
        if self.target is Target.MAX_KL and v < 0:
            raise RequestError(f"max_kl must be at least 0 nats per token, got {v:g}")
        if self.target is Target.MAX_LATENCY_MS and v <= 0:
            raise RequestError(f"max_latency_ms must be above 0 ms per token, got {v:g}")
        if self.target in _WHOLE and (v <= 0 or v != int(v)):
            raise RequestError(f"{name} must be a whole number above 0, got {v:g}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> Request:
        """Read the JSON object of every edge, e.g. ``{"sparsity": 0.6, "served_as": "mask"}``.

        Raises:
            RequestError: unknown names, no or two targets, wrong types, or values outside their
                range.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        for name in given:
            if name not in {*Target, *_QUALIFIERS}:
                raise RequestError(f"unknown request field {name!r}; targets: {', '.join(Target)}")
        targets = [name for name in given if name not in _QUALIFIERS]
        if len(targets) != 1:
            found = " and ".join(targets) if targets else "none"
            raise RequestError(
                f"a request has exactly one target out of {', '.join(Target)}; got {found}"
            )
        value = given[targets[0]]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RequestError(f"{targets[0]} must be a number, got {value!r}")
        served_as = given.get("served_as")
        if served_as is not None and served_as not in [*ServedAs]:
            raise RequestError(f"served_as must be one of {', '.join(ServedAs)}, got {served_as!r}")
        return cls(
            target=Target(targets[0]),
            value=_as_float(value),
            served_as=None if served_as is None else ServedAs(str(served_as)),
            task_weights=_read_weights(given.get("task_weights")),
            context=_read_count("context", given.get("context")),
            batch=_read_count("batch", given.get("batch")),
        )

    def to_dict(self) -> dict[str, object]:
        """Return the JSON object that `from_dict` reads back to an equal request."""
        value = int(self.value) if self.target in _WHOLE else self.value
        document: dict[str, object] = {self.target.value: value}
        if self.served_as is not None:
            document["served_as"] = self.served_as.value
        if self.task_weights is not None:
            document["task_weights"] = dict(self.task_weights)
        counts = {"context": self.context, "batch": self.batch}
        return document | {name: count for name, count in counts.items() if count is not None}


def _read_count(name: str, given: object) -> int | None:
    if given is None:
        return None
    if (
        isinstance(given, bool)
        or not isinstance(given, int | float)
        or not _as_float(given).is_integer()
    ):
        raise RequestError(f"{name} must be a whole number above 0, got {given!r}")
    return int(given)


def _read_weights(given: object) -> tuple[tuple[str, float], ...] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) or not given:
        raise RequestError(
            f'task_weights must be an object like {{"code": 0.7, "prose": 0.3}}, got {given!r}'
        )
    for name, weight in given.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise RequestError(f"the task weight of {name} must be a number, got {weight!r}")
    return tuple((str(name), _as_float(weight)) for name, weight in given.items())


def _as_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # a whole number of more than 308 digits
        return math.inf


def _check_weights(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise RequestError(f"the task weight of {name} must be at least 0, got {weight:g}")
    total = sum(weights.values())
    if abs(total - 1) > _WEIGHT_SLACK:
        raise RequestError(f"task weights must sum to 1, got {total:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One prunable matrix: a Linear (or GPT-2's Conv1D) inside a transformer block.

    ``path`` is the module's dotted path in the loaded model. ``num_rows x num_columns`` is the
    matrix as output rows by input columns; ``transposed`` says that the module stores it the other
    way round; a weight takes ``item_bytes`` in the model's files.
    """

    block: int
    path: str
    num_rows: int
    num_columns: int
    transposed: bool = False
    item_bytes: int = 4

    @property
    def num_weights(self) -> int:
        """Weights in the matrix, bias excluded."""
        return self.num_rows * self.num_columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A sub-module of a block whose output is added to the residual stream: attention or MLP.

    It can be removed by itself, exactly. ``modules`` are the dotted paths of all that goes with it,
    its norm included; the last one's output is what is added. ``sites`` are its matrices' paths in
    the order in which they run; the last one reads what the others produce. ``num_params`` and
    ``num_bytes`` (as stored) count everything inside.

    Where it can be narrowed, it is made of ``num_units`` equal units (feed-forward channels; key
    and value heads with their query heads), each of ``unit_params`` parameters and ``unit_bytes``
    bytes, of which ``unit_biases`` are biases; 0 units: it can't be. ``head_size``: the coordinates
    of every head, where its units are groups of heads and its sites queries, keys, values, outputs.
    """

    block: int
    modules: tuple[str, ...]
    sites: tuple[str, ...]
    num_params: int
    num_bytes: int
    num_units: int = 0
    unit_params: int = 0
    unit_biases: int = 0
    unit_bytes: int = 0
    head_size: int = 0

    @property
    def path(self) -> str:
        """The module whose output is added."""
        return self.modules[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """What the method needs to know of a model, without the model.

    ``digest`` is the sha256 over the names and contents of its weight files. ``block_params[b]``
    counts every unique parameter inside block b (sites, biases, norms); ``block_bytes[b]`` their
    bytes as stored; ``total_params`` and ``total_bytes`` count the whole model, tied tensors once.
    ``parts`` divide every block, in order; none where they can't be told apart without doubt.
    ``kv_heads[b]`` are the heads whose keys and values block b caches, and the size of each; none
    where the model has no such cache.
    """

    digest: str
    architecture: str
    sites: tuple[Site, ...]
    block_paths: tuple[str, ...]
    block_params: tuple[int, ...]
    block_bytes: tuple[int, ...]
    total_params: int
    total_bytes: int
    vocabulary_size: int
    max_context: int
    parts: tuple[Part, ...] = ()
    kv_heads: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if len({site.path for site in self.sites}) != len(self.sites):
            raise ValueError("site paths must be unique")

    @property
    def num_blocks(self) -> int:
        """Transformer blocks."""
        return len(self.block_paths)

    @property
    def num_site_weights(self) -> int:
        """Weights in all sites: what `sparsity` is a fraction of."""
        return sum(site.num_weights for site in self.sites)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """The decoded setting of every axis, in the space's order. Equal settings have equal keys."""

    settings: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        if len({name for name, _ in self.settings}) != len(self.settings):
            raise ValueError("axis names must be unique")

    @cached_property
    def key(self) -> str:
        """The sha256 of the settings as canonical JSON, in hexadecimal."""
        text = json.dumps(self.settings, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.key)  # kept; that of all settings would be reckoned anew every time

    @property
    def values(self) -> tuple[float, ...]:
        """The settings' values in axis order."""
        return tuple(value for _, value in self.settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A strategy to evaluate, with derivatives or without, and where it stands in the run.

    ``tokens`` is its fidelity: how many tokens of the search text to judge it on; none: all.
    """

    round: int
    position: int
    strategy: Strategy
    derivatives: bool
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskValue:
    """What an evaluation measured on one of several search texts: as `Evaluation`, of that text."""

    task: str
    kl: float
    gradient: tuple[float, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A strategy's measured values.

    ``kl`` is KL(dense‖pruned) in nats per token; ``kept_fraction`` is 1 - sparsity over sites;
    ``gradient`` is the derivative of kl to every axis' setting, in axis order, or none;
    ``cost_units`` counts forward passes over the run's search tokens (3 with derivatives).
    ``tasks`` are the values of each text, where the run has several of equal size; ``kl`` and
    ``gradient`` are then their means.
    """

    strategy_key: str
    kl: float
    kept_fraction: float
    gradient: tuple[float, ...] | None
    tokens: int
    text_digest: str
    cost_units: float
    wall_s: float
    tasks: tuple[TaskValue, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.kl) and all(map(math.isfinite, self.gradient or ()))):
            raise ValueError(
                f"strategy {self.strategy_key[:12]}: kl and gradient must be finite, "
                f"got kl {self.kl}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedEvaluation:
    """A strategy whose evaluation failed: recorded with its reason, never an end of the run."""

    strategy_key: str
    kind: str
    message: str
    wall_s: float = 0.0

    @classmethod
    def from_error(
        cls, strategy_key: str, error: BaseException, *, wall_s: float = 0.0
    ) -> FailedEvaluation:
        """Describe what an evaluation raised, its message in one line of at most 500 letters."""
        kind, message = type(error).__name__, " ".join(str(error).split())[:500]
        return cls(strategy_key=strategy_key, kind=kind, message=message, wall_s=wall_s)


Outcome = Evaluation | FailedEvaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Predicted KL on fresh text, nats per token: mean and a 95% interval for one measurement."""

    mean: float
    lo95: float
    hi95: float

    def __post_init__(self) -> None:
        if not 0 <= self.lo95 <= self.mean <= self.hi95:
            raise ValueError(
                f"need 0 <= lo95 <= mean <= hi95, got {self.lo95}, {self.mean}, {self.hi95}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedLatency:
    """Predicted milliseconds per token while ``batch`` sequences are decoded at a time.

    ``ms`` is the variant's and ``dense_ms`` the dense model's on the machine that was measured: how
    long a step takes, after which every sequence has its next token.
    """

    batch: int
    ms: float
    dense_ms: float

    def to_dict(self) -> dict[str, float]:
        """Return what plan documents say under ``predicted``."""
        return {
            "batch": self.batch,
            "ms_per_token": self.ms,
            "dense_ms_per_token": self.dense_ms,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer to one request: strategy, exact size, predicted quality.

    Where bits were learned: ``packed_bytes`` is what a lossless form of the weights needs at most
    (`unicuco.dimensions.byte_cost`), ``kv_bytes`` what keys and values take, as far as the request
    says how many. ``latency`` is there where the run has a latency model.
    """

    request: Request
    strategy: Strategy
    sparsity: float
    kept_params: int
    total_params: int
    num_bytes: int
    served_as: ServedAs
    kl: Prediction
    packed_bytes: int | None = None
    kv_bytes: int | None = None
    latency: PredictedLatency | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the plan document of the command line and of HTTP."""
        return {
            "request": self.request.to_dict(),
            "strategy": {"settings": dict(self.strategy.settings)},
            "sparsity": self.sparsity,
            "kept_params": self.kept_params,
            "total_params": self.total_params,
            "bytes": self.num_bytes,
            **self._more_bytes(),
            "served_as": self.served_as.value,
            "predicted": {
                "kl": {"mean": self.kl.mean, "lo95": self.kl.lo95, "hi95": self.kl.hi95},
                **({} if self.latency is None else {"latency": self.latency.to_dict()}),
            },
        }

    def _more_bytes(self) -> dict[str, object]:
        more: dict[str, object] = {}
        if self.packed_bytes is not None:
            more["packed_bytes"] = self.packed_bytes
        if self.kv_bytes is not None:
            more |= {"kv_bytes": self.kv_bytes, "total_bytes": self.num_bytes + self.kv_bytes}
        return more
