"""`LocalEvaluator`: judges strategies in this process, on one private working copy of the model.

A strategy is cut from the dense weights and the rank store into the working copy (one pass over the
weights), the search text runs through it, and its KL to the cached dense predictions is averaged
over tokens; with derivatives, a backward pass gives the rank-window derivative along every axis.
Dense weights, ranks, text and dense predictions may be read-only arrays shared by all evaluators of
a node. Computation is in float32.

What it does not know: why a strategy is asked, and where it stands in a run.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from unicuco.dimensions import Granularity, build_cost
from unicuco.errors import EvaluationError
from unicuco.evaluate.rank_window import site_derivative
from unicuco.levels import LevelDatabase
from unicuco.models import build_skeleton, site_module
from unicuco.objectives import DenseReference
from unicuco.pruners import LevelPruner
from unicuco.ranks import cut
from unicuco.rows import RowRule
from unicuco.types import Evaluation, ModelProfile, Site, Strategy, TaskValue

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Arrays = Mapping[str, NDArray[np.generic]]

_BFLOAT16: Final = (
    "bfloat16/"  # numpy has no bfloat16: such tensors travel as int16 under this prefix
)
_COST_WITH_DERIVATIVES: Final = 3.0
_UNKNOWN: Final = -1  # dropped weights of a site whose cut did not end
_WINDOWS_PER_PASS: Final = 1  # more are no faster, and need more memory for activations


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatorConfig:
    """What an evaluator needs besides its arrays; small, and the same on every node.

    ``model_config`` is the model's configuration as JSON; ``threads`` are torch threads (0: leave
    as they are). ``tasks`` are the texts, of equally many windows each, that the search text is
    made of, where there are several. ``levels`` is the folder of a level database that sites are
    taken from instead of being cut by the rank store; such evaluators know no derivatives and no
    row rules.
    """

    model_config: str
    profile: ModelProfile
    dimensions: tuple[str, ...]
    granularity: Granularity
    text_digest: str
    threads: int = 0
    tasks: tuple[str, ...] = ()
    levels: str = ""


class LocalEvaluator:
    """Judges strategies on one text.

    Args:
        config: the evaluator's configuration.
        arrays: named as `pack_model` and `pack_text` name them.
    """

    def __init__(self, config: EvaluatorConfig, arrays: Arrays) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self._cost = build_cost(config.profile, config.dimensions, config.granularity)
        tensors = unpack(arrays)
        self._ids = tensors["text/ids"]
        self._reference = DenseReference(
            probabilities=tensors["text/probabilities"],
            indices=tensors.get("text/indices"),
            negative_entropy=tensors["text/negative_entropy"],
        )
        self._ranks = {site.path: tensors[f"rank/{site.path}"] for site in config.profile.sites}
        self._fisher = {site.path: tensors[f"fisher/{site.path}"] for site in config.profile.sites}
        state = state_of(tensors)
        self._model = working_copy(config.model_config, state)
        self._dense = {
            site.path: _oriented(state[f"{site.path}.weight"], site)
            for site in config.profile.sites
        }
        self._levels = (
            LevelPruner(LevelDatabase(Path(config.levels)), self._dense) if config.levels else None
        )
        self._dropped: dict[str, int] = dict.fromkeys(self._dense, 0)
        self._rows: dict[str, Tensor | None] = {}

    @classmethod
    def from_arrays(cls, config: EvaluatorConfig, arrays: Arrays) -> LocalEvaluator:
        """Build an evaluator: the constructor under the name that every backend uses."""
        return cls(config, arrays)

    def evaluate(
        self,
        strategy: Strategy,
        *,
        tokens: int | None = None,
        derivatives: bool = False,
        rows: RowRule | None = None,
    ) -> Evaluation:
        """Measure one strategy.

        Args:
            strategy: of the space that the configuration describes.
            tokens: use only the text's first windows, at least this many tokens, or the first
                tokens of its first window; none: all.
            derivatives: also return the derivative of the KL along every axis (sparsity axes only).
            rows: how a site's dropped weights are spread over its rows; none: equally.

        Returns:
            The evaluation; ``cost_units`` is relative to one forward pass over the whole text.

        Raises:
            EvaluationError: the KL or a derivative is not finite.
            ValueError: derivatives are asked of a space with other axes than sparsity, under a row
                rule or of levels, or a row rule of levels.
        """
        if derivatives and (rows is not None or self._levels is not None):
            raise ValueError("there are no derivatives under a row rule or of levels")
        if derivatives and self.config.dimensions != ("sparsity",):
            raise ValueError(
                f"only sparsity has derivatives, the axes are {', '.join(self.config.dimensions)}"
            )
        started = time.perf_counter()
        ids = self._windows(tokens)
        self._load(strategy, rows)
        kl, gradient, tasks = self._measure(ids, derivatives)
        if not all(map(math.isfinite, (kl, *(gradient or ())))):
            raise EvaluationError(
                f"strategy {strategy.key[:12]} gives a KL of {kl}: the pruned model overflows",
                strategy_key=strategy.key,
            )
        share = ids.numel() / self._ids.numel()
        dropped = sum(self._dropped.values())
        return Evaluation(
            strategy_key=strategy.key,
            kl=max(kl, 0.0),
            kept_fraction=1.0 - dropped / self.config.profile.num_site_weights,
            gradient=gradient,
            tokens=ids.numel(),
            text_digest=self.config.text_digest,
            cost_units=share * (_COST_WITH_DERIVATIVES if derivatives else 1.0),
            wall_s=time.perf_counter() - started,
            tasks=tasks,
        )

    def window_kl(self, strategy: Strategy, *, rows: RowRule | None = None) -> Tensor:
        """Return the mean KL per token of every window of the text, ``n`` float64."""
        self._load(strategy, rows)
        width = self._ids.shape[1]
        means = []
        with torch.no_grad():
            for k, window in enumerate(self._ids.split(1)):
                logits = self._model(input_ids=window, use_cache=False).logits.flatten(0, 1)
                means.append(
                    self._reference.slice(k * width, (k + 1) * width).kl(logits).double().mean()
                )
        return torch.stack(means)

    @torch.no_grad()
    def quality(self, strategy: Strategy, *, rows: RowRule | None = None) -> tuple[float, float]:
        """Return the mean KL per token and the mean loss per next token of the text, in nats."""
        self._load(strategy, rows)
        kl, loss, position = 0.0, 0.0, 0
        for window in self._ids.split(1):
            logits = self._model(input_ids=window, use_cache=False).logits[0].float()  # (t, v)
            reference = self._reference.slice(position, position + len(logits))
            kl += float(reference.kl(logits).double().sum())
            loss += float(cross_entropy(logits[:-1], window[0, 1:], reduction="sum"))
            position += len(logits)
        return max(kl / position, 0.0), loss / (position - len(self._ids))

    def model_at(self, strategy: Strategy, *, rows: RowRule | None = None) -> PreTrainedModel:
        """Return the working copy of the model at a strategy, until the next one is judged."""
        self._load(strategy, rows)
        return self._model

    def _windows(self, tokens: int | None) -> Tensor:
        if tokens is None:
            return self._ids
        if tokens < self._ids.shape[1]:
            return self._ids[:1, : max(1, tokens)]  # a causal model predicts the same for them
        return self._ids[: math.ceil(tokens / self._ids.shape[1])]

    def _load(self, strategy: Strategy, rows: RowRule | None = None) -> None:
        """Bring the working copy to a strategy, cutting only the sites that change."""
        if rows is not None and self._levels is not None:
            raise ValueError("levels are matrices as they are: a row rule can't spread their drops")
        drops = self._cost.site_drops(strategy.values)
        with torch.no_grad():
            for site in self.config.profile.sites:
                offsets = None if rows is None else rows.of(site.path)
                same = drops[site.path] == self._dropped[site.path]
                if not (same and offsets is None and self._rows.get(site.path) is None):
                    # Until it is cut, nobody may take it for what it was: a cut may fail.
                    self._dropped[site.path] = _UNKNOWN
                    self._cut(site, drops[site.path], offsets)
                self._rows[site.path] = offsets
                self._dropped[site.path] = drops[site.path]
        self._cost.apply(self._model, strategy.values)

    def _cut(self, site: Site, num_dropped: int, rows: Tensor | None) -> None:
        path = site.path
        target = _oriented(_weight(self._model, site).data, site)
        dense = self._dense[path]
        if self._levels is not None:
            target.copy_(self._levels.materialise(site, num_dropped))
        elif dense.dtype == target.dtype:
            cut(dense, self._ranks[path], num_dropped, rows=rows, out=target)
        else:  # weights that are kept in half precision are computed with in float32
            target.copy_(cut(dense, self._ranks[path], num_dropped, rows=rows))

    def _measure(
        self, ids: Tensor, derivatives: bool
    ) -> tuple[float, tuple[float, ...] | None, tuple[TaskValue, ...]]:
        """Return KL, derivative, and the values of each task where there are several."""
        if self.config.tasks and len(ids) == len(self._ids):
            tasks = tuple(self._run_tasks(ids, derivatives))
            return *_mean_of(tasks), tasks
        kl = self._run(ids, derivatives)
        return kl, self._gradient() if derivatives else None, ()

    def _run_tasks(self, ids: Tensor, derivatives: bool) -> Iterator[TaskValue]:
        """Measure every task's own windows."""
        count = len(ids) // len(self.config.tasks)
        for k, (task, windows) in enumerate(zip(self.config.tasks, ids.split(count), strict=True)):
            kl = self._run(windows, derivatives, first_window=k * count)
            gradient = self._gradient() if derivatives else None
            yield TaskValue(task=task, kl=max(kl, 0.0), gradient=gradient)

    def _run(self, ids: Tensor, derivatives: bool, *, first_window: int = 0) -> float:
        """Return the mean KL per token; with derivatives, leave gradients on the site weights.

        ``first_window`` says where in the text the windows begin.
        """
        for site in self.config.profile.sites:
            weight = _weight(self._model, site)
            weight.requires_grad_(derivatives)
            weight.grad = None
        total = 0.0
        position = first_window * self._ids.shape[1]
        for windows in ids.split(_WINDOWS_PER_PASS):
            with torch.set_grad_enabled(derivatives):
                logits = self._model(input_ids=windows, use_cache=False).logits.flatten(
                    0, 1
                )  # (t, v)
                kl = self._reference.slice(position, position + len(logits)).kl(logits).sum()
                if derivatives:
                    (kl / ids.numel()).backward()
            total += float(kl.detach())
            position += len(logits)
        return total / ids.numel()

    def _gradient(self) -> tuple[float, ...]:
        """Return dKL/ds along every axis; a block axis sums its sites."""
        by_site = [self._site_derivative(site) for site in self.config.profile.sites]
        if self.config.granularity is Granularity.LAYER:
            return tuple(by_site)
        by_block = [0.0] * self.config.profile.num_blocks
        for site, value in zip(self.config.profile.sites, by_site, strict=True):
            by_block[site.block] += value
        return tuple(by_block)

    def _site_derivative(self, site: Site) -> float:
        gradient = _weight(self._model, site).grad
        assert gradient is not None, "gradients follow a run with derivatives"
        path = site.path
        return site_derivative(
            _oriented(gradient, site),
            self._dense[path],
            self._ranks[path],
            self._dropped[path],
            self._fisher[path],
        )


def _mean_of(tasks: Sequence[TaskValue]) -> tuple[float, tuple[float, ...] | None]:
    """Return the mean KL and derivative of tasks of equal size."""
    kl = sum(value.kl for value in tasks) / len(tasks)
    gradients = [value.gradient for value in tasks if value.gradient is not None]
    if len(gradients) < len(tasks):
        return kl, None
    return kl, tuple(sum(parts) / len(tasks) for parts in zip(*gradients, strict=True))


@torch.no_grad()
def dense_reference(model: nn.Module, ids: Tensor) -> DenseReference:
    """Run ``n x context`` windows through the dense model and keep its predictions."""
    return DenseReference.concatenate(
        [
            DenseReference.from_logits(
                model(input_ids=windows, use_cache=False).logits.flatten(0, 1)
            )
            for windows in ids.split(_WINDOWS_PER_PASS)
        ]
    )


def pack_model(
    state: Mapping[str, Tensor], ranks: Mapping[str, Tensor], fisher: Mapping[str, Tensor]
) -> dict[str, NDArray[np.generic]]:
    """Name a model's tensors, drop orders and Fisher sums as the arrays of an evaluator."""
    named = {f"state/{name}": tensor for name, tensor in state.items()}
    named |= {f"rank/{path}": tensor for path, tensor in ranks.items()}
    named |= {f"fisher/{path}": tensor for path, tensor in fisher.items()}
    return dict(map(_as_array, named.items()))


def pack_text(ids: Tensor, reference: DenseReference) -> dict[str, NDArray[np.generic]]:
    """Name a text and its dense predictions as the arrays of an evaluator."""
    named = {
        "text/ids": ids,
        "text/probabilities": reference.probabilities,
        "text/negative_entropy": reference.negative_entropy,
    }
    if reference.indices is not None:
        named["text/indices"] = reference.indices
    return dict(map(_as_array, named.items()))


def unpack(arrays: Arrays) -> dict[str, Tensor]:
    """Return arrays as tensors by their plain names, in place."""
    tensors = {name: _as_tensor(name, array) for name, array in arrays.items()}
    return {name.removeprefix(_BFLOAT16): tensor for name, tensor in tensors.items()}


def state_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of unpacked arrays that are the model's, by the model's names."""
    return {
        name.removeprefix("state/"): t for name, t in tensors.items() if name.startswith("state/")
    }


def working_copy(model_config: str, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """Build a model of one's own, in float32, of its configuration as JSON and its tensors."""
    model = build_skeleton(json.loads(model_config))
    model.float().eval().requires_grad_(False)
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    tensors = model.state_dict(keep_vars=True)
    loaded = {tensors[name].data_ptr() for name in state if name in tensors}
    absent = [
        name for name in missing if tensors[name].data_ptr() not in loaded
    ]  # tied tensors come once
    unfit = [*absent, *unexpected]
    assert not unfit, f"state does not fit the model: {unfit}"
    return model


def _weight(model: nn.Module, site: Site) -> nn.Parameter:
    weight = site_module(model, site).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _oriented(matrix: Tensor, site: Site) -> Tensor:
    return matrix.T if site.transposed else matrix


def _as_array(item: tuple[str, Tensor]) -> tuple[str, NDArray[np.generic]]:
    name, tensor = item
    tensor = tensor.detach().contiguous().cpu()
    if tensor.dtype is torch.bfloat16:
        return _BFLOAT16 + name, tensor.view(torch.int16).numpy()
    return name, tensor.numpy()


def _as_tensor(name: str, array: NDArray[np.generic]) -> Tensor:
    with warnings.catch_warnings():
        # Arrays that Ray shares are read-only; nothing here writes to them, torch only can't know.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if name.startswith(_BFLOAT16) else tensor
