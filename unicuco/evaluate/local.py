"""`LocalEvaluator`: judges strategies in this process, on one private working copy of the model.

A strategy is cut from the dense weights and the rank store into the working copy (one pass over the
weights), the search text runs through it, and its KL to the cached dense predictions is averaged
over tokens; with derivatives, a backward pass gives the derivative along every axis: of sparsity by
rank windows, of shapes as `unicuco.evaluate.shape_slopes` says.
Dense weights, ranks, text and dense predictions may be read-only arrays shared by all evaluators of
a node. On a GPU all of them and the working copy are in its memory.

What it does not know: why a strategy is asked, and where it stands in a run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from unicuco.dimensions import ByteCost, build_cost
from unicuco.errors import RequestError
from unicuco.evaluate.arrays import Arrays, reference_of, state_of, unpack, working_copy
from unicuco.evaluate.device import dtype_of
from unicuco.evaluate.measure import (
    EvaluatorConfig,
    by_axis,
    check_derivatives,
    conclude,
    groups_of,
    windows_of,
)
from unicuco.evaluate.shape_slopes import Change, neighbours, shape_slope
from unicuco.evaluate.sites import SiteWeights
from unicuco.importance.units import UnitStore, last_sites
from unicuco.models import gate, site_module
from unicuco.models.kv_cache import RoundedCache
from unicuco.objectives import DenseReference
from unicuco.rows import RowRule
from unicuco.space import Narrowing, Shape
from unicuco.types import Evaluation, Site, Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNKNOWN: Final = -1  # dropped weights of a site whose cut did not end
_OPENED: Final = Narrowing(units=-1)  # what a site has lost whose lost lines are there again
_WINDOWS_PER_PASS: Final = 1  # more are no faster, and need more memory for activations


class LocalEvaluator:
    """Judges strategies on one text.

    Args:
        config: the evaluator's configuration.
        arrays: named as `pack_model` and `pack_text` name them.

    Raises:
        RequestError: no weights are among them.
    """

    def __init__(self, config: EvaluatorConfig, arrays: Arrays) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self._cost = build_cost(config.profile, config.dimensions, config.granularity)
        tensors = unpack(arrays, config.device)
        self._ids = tensors["text/ids"]
        self._reference = reference_of(tensors)
        state = state_of(tensors)
        if not state:
            raise RequestError("a model in shards is judged on Ray: give an address, or one shard")
        self._model = working_copy(config.model_config, state, config.device, dtype_of(config))
        sites = config.profile.sites
        self._weights = {site.path: _weight(self._model, site) for site in sites}
        self._sites = SiteWeights(
            {site.path: state[f"{site.path}.weight"] for site in sites},
            {site.path: tensors[f"rank/{site.path}"] for site in sites},
            {site.path: tensors[f"fisher/{site.path}"] for site in sites},
            sites,
            levels=config.levels,
            units=UnitStore.from_tensors(tensors),
            biases={s.path: b for s in sites if (b := state.get(f"{s.path}.bias")) is not None},
            factors={
                s.path: t for s in sites if (t := tensors.get(f"factor/{s.path}")) is not None
            },
        )
        self._part_of = {path: p for p, part in enumerate(self._cost.parts) for path in part.sites}
        self._dropped: dict[str, int] = dict.fromkeys((site.path for site in sites), 0)
        self._lost: dict[str, Narrowing] = dict.fromkeys((s.path for s in sites), Narrowing())
        self._bits: dict[str, int] = dict.fromkeys((site.path for site in sites), 16)
        self._kv_bits: tuple[int, ...] = ()
        self._rows: dict[str, Tensor | None] = {}
        self._gates: dict[int, Tensor] = {}

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
            derivatives: also return the derivative of the KL along every axis.
            rows: how a site's dropped weights are spread over its rows; none: equally.

        Returns:
            The evaluation; ``cost_units`` is relative to one forward pass over the whole text.

        Raises:
            EvaluationError: the KL or a derivative is not finite.
            ValueError: derivatives are asked of a space with axes that have none, under a row rule
                or of levels, or a row rule of levels.
        """
        if derivatives and rows is not None:
            raise ValueError("there are no derivatives under a row rule or of levels")
        if derivatives:
            check_derivatives(self.config)
        started = time.perf_counter()
        ids = windows_of(self._ids, tokens)
        self._load(strategy, rows)
        is_whole = ids.numel() == self._ids.numel()
        kl_sums: list[float] = []
        slopes: list[list[float]] = []
        num_dropped = sum(self._dropped.values())
        with self._opened(strategy.values) if derivatives else nullcontext():
            for group in groups_of(self.config, len(ids), is_whole=is_whole):
                windows = ids[group.first : group.first + group.count]
                kl_sums += self._run(windows, derivatives, first_window=group.first)
                if derivatives:
                    slopes.append(self._slopes(strategy.values))
        return conclude(
            self.config,
            strategy,
            windows=(len(ids), ids.shape[1]),
            text_tokens=self._ids.numel(),
            kl_sums=kl_sums,
            slopes=slopes,
            num_dropped=num_dropped,
            wall_s=time.perf_counter() - started,
        )

    def window_kl(self, strategy: Strategy, *, rows: RowRule | None = None) -> Tensor:
        """Return the mean KL per token of every window of the text, ``n`` float64."""
        self._load(strategy, rows)
        width = self._ids.shape[1]
        means = []
        with torch.no_grad():
            for k, window in enumerate(self._ids.split(1)):
                logits = self._logits(window)
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
            logits = self._logits(window).float()
            reference = self._reference.slice(position, position + len(logits))
            kl += float(reference.kl(logits).double().sum())
            loss += float(cross_entropy(logits[:-1], window[0, 1:], reduction="sum"))
            position += len(logits)
        return max(kl / position, 0.0), loss / (position - len(self._ids))

    def model_at(self, strategy: Strategy, *, rows: RowRule | None = None) -> PreTrainedModel:
        """Return the working copy of the model at a strategy, until the next one is judged."""
        self._load(strategy, rows)
        return self._model

    def _load(self, strategy: Strategy, rows: RowRule | None = None) -> None:
        """Bring the working copy to a strategy, cutting only the sites that change."""
        if rows is not None and self.config.levels:
            raise ValueError("levels are matrices as they are: a row rule can't spread their drops")
        shape = self._cost.shape(strategy.values)
        narrowed = dict(shape.narrowed)
        sites = self.config.profile.sites
        bits = (16,) * len(sites)
        if isinstance(self._cost, ByteCost):
            bits = self._cost.weight_bits(strategy.values)
            self._kv_bits = self._cost.kv_bits(strategy.values)
        with torch.no_grad():
            for site, size, zeroed, own in zip(sites, shape.sizes, shape.zeroed, bits, strict=True):
                path, drop = site.path, site.num_weights - size + zeroed
                offsets = None if rows is None else rows.of(path)
                lost = narrowed.get(self._part_of[path], Narrowing())
                was = (self._dropped[path], self._lost[path], self._bits[path])
                same = (drop, lost, own) == was
                if not (same and offsets is None and self._rows.get(path) is None):
                    # Until it is cut, nobody may take it for what it was: a cut may fail.
                    self._dropped[path] = _UNKNOWN
                    if lost:
                        self._narrow(site, lost, zeroed)
                    else:
                        self._cut(site, drop, offsets)
                    if lost != self._lost[path]:
                        self._narrow_bias(site, lost)
                    self._sites.quantise(site, own, self._weights[site.path].data)
                self._rows[path] = offsets
                self._dropped[path] = drop
                self._lost[path] = lost
                self._bits[path] = own
        self._cost.apply(self._model, strategy.values)

    @contextmanager
    def _opened(self, values: Sequence[float]) -> Iterator[None]:
        """Let what is gone run on, behind zeros, while the block runs; see `shape_slopes`."""
        shape = self._cost.shape(tuple(values))
        for p, less in shape.narrowed:
            part = self._cost.parts[p]
            for path in part.sites[:-1]:
                # The next strategy writes these anew, whatever it loses there.
                self._dropped[path], self._lost[path] = _UNKNOWN, _OPENED
                site = self._site(path)
                bias = site_module(self._model, site).bias
                lines = bias.data if isinstance(bias, nn.Parameter) else None
                self._sites.reopen(site, part, less, self._weights[site.path].data, lines)
        for p in shape.parts:
            for path in self._cost.parts[p].sites:
                self._dropped[path] = _UNKNOWN
                self._cut(self._site(path), 0, None)
        with ExitStack() as hooks:
            hooks.callback(self._gates.clear)
            if "depth" in self.config.dimensions:
                self._cost.apply(self._model, [0.0] * len(values))  # gates remove them instead
                for p, part in enumerate(self._cost.parts):
                    there = float(p not in shape.parts)
                    factor = torch.tensor(there, device=self.config.device, requires_grad=True)
                    self._gates[p] = factor
                    module = self._model.get_submodule(part.path)
                    hooks.callback(gate(module, factor).remove)
            yield

    def _logits(self, windows: Tensor) -> Tensor:
        """Return the ``t x v`` logits of ``n x context`` windows at the present strategy."""
        if all(bits == 16 for bits in self._kv_bits):
            out = self._model(input_ids=windows, use_cache=False)
        else:
            cache = RoundedCache(self._kv_bits)
            out = self._model(input_ids=windows, past_key_values=cache, use_cache=True)
        logits: Tensor = out.logits.flatten(0, 1)
        return logits

    def _narrow(self, site: Site, less: Narrowing, num_zeroed: int) -> None:
        part = self._cost.parts[self._part_of[site.path]]
        target = self._weights[site.path].data
        self._sites.narrow(site, part, less, num_zeroed, target)

    def _narrow_bias(self, site: Site, less: Narrowing) -> None:
        bias = site_module(self._model, site).bias
        if isinstance(bias, nn.Parameter):
            part = self._cost.parts[self._part_of[site.path]]
            self._sites.narrow_bias(site, part, less, bias.data)

    def _cut(self, site: Site, num_dropped: int, rows: Tensor | None) -> None:
        self._sites.cut(site, num_dropped, self._weights[site.path].data, rows=rows)

    def _run(self, ids: Tensor, derivatives: bool, *, first_window: int) -> list[float]:
        """Return every window's KL; with derivatives, leave gradients on the site weights.

        ``first_window`` says where in the text the windows begin.
        """
        for site in self.config.profile.sites:
            weight = self._weights[site.path]
            weight.requires_grad_(derivatives and site.path in self._sloped)
            weight.grad = None
        for factor in self._gates.values():
            factor.grad = None
        sums: list[float] = []
        position = first_window * self._ids.shape[1]
        for windows in ids.split(_WINDOWS_PER_PASS):
            with torch.set_grad_enabled(derivatives):
                logits = self._logits(windows)
                kl = self._reference.slice(position, position + len(logits)).kl(logits).sum()
                if derivatives:
                    (kl / ids.numel()).backward()
            sums.append(float(kl.detach()))
            position += len(logits)
        return sums

    @cached_property
    def _sloped(self) -> frozenset[str]:
        """The sites whose gradients derivatives are made of."""
        if "sparsity" in self.config.dimensions:
            return frozenset(site.path for site in self.config.profile.sites)
        return frozenset(last_sites(self.config.profile).values())

    def _slopes(self, values: Sequence[float]) -> list[float]:
        """Return dKL/ds along every axis."""
        slopes: list[float] = []
        for dimension in self._cost.dimensions:
            axes = dimension.axes(self.config.profile, self.config.granularity)
            if not any(axis.is_shape for axis in axes):
                slopes += by_axis(self.config, self._site_slopes(values))
                continue
            for axis in axes:
                steps = neighbours(self._cost, values, len(slopes), axis)
                slopes.append(shape_slope(steps, self._gates, self._change))
        return slopes

    def _site_slopes(self, values: Sequence[float]) -> list[float]:
        """Return dKL/ds of every site's sparsity; 0 where the site is gone."""
        sites = self.config.profile.sites
        shape = self._cost.shape(tuple(values))
        narrowed = dict(shape.narrowed)
        slopes = []
        for site, zeroed in zip(sites, shape.zeroed, strict=True):
            p, gradient = self._part_of[site.path], self._weights[site.path].grad
            if p in shape.parts:
                slopes.append(0.0)
            elif p in narrowed:
                part = self._cost.parts[p]
                slopes.append(self._sites.slope_narrowed(site, part, narrowed[p], gradient, zeroed))
            else:
                slopes.append(self._sites.slope(site, gradient, zeroed))
        return slopes

    def _last_matrix(self, p: int, shape: Shape) -> Tensor:
        """Return the last matrix of a part in a shape, as it is stored, zeros where it has none."""
        part = self._cost.parts[p]
        position = self._position[part.sites[-1]]
        site = self.config.profile.sites[position]
        matrix = torch.zeros_like(self._weights[site.path].data)
        less = dict(shape.narrowed).get(p, Narrowing())
        if less:
            self._sites.narrow(site, part, less, shape.zeroed[position], matrix)
        else:
            self._sites.cut(site, shape.zeroed[position], matrix)
        return matrix

    def _change(self, p: int, old: Shape, new: Shape) -> Change:
        """Return what the KL does as a part's last matrix changes."""
        part = self._cost.parts[p]
        site = self._site(part.sites[-1])
        gradient = self._weights[site.path].grad
        assert gradient is not None, "gradients follow a run with derivatives"
        change = self._last_matrix(p, new).float() - self._last_matrix(p, old)
        return Change(
            first=float((gradient.float() * change).sum()),
            second=self._sites.curvature(site, part, change),
        )

    def _site(self, path: str) -> Site:
        return self.config.profile.sites[self._position[path]]

    @cached_property
    def _position(self) -> dict[str, int]:
        return {site.path: k for k, site in enumerate(self.config.profile.sites)}


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


def _weight(model: nn.Module, site: Site) -> nn.Parameter:
    weight = site_module(model, site).weight
    assert isinstance(weight, nn.Parameter)
    return weight
