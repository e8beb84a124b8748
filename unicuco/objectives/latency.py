"""Milliseconds per token while decoding: a linear model of what is left of the blocks.

A step of decoding reads every weight once and multiplies it by one vector per sequence. At one
batch the bytes that a part moves and the operations that it does are both proportional to the
weights that its sites store, so one coefficient stands for both; another one is what a part costs
by being there (launching its operations, its norm), and a constant is all that no strategy changes:
embeddings, head, sampling, the engine's own work. Zeros of masks cost what other weights cost.

    ms = c_0 + sum over kinds (c_present · parts that are there + c_weights · their weights)

Coefficients are not negative, so less of anything is never slower. They are fitted for every batch
that was measured, by least squares of the relative errors, and linear between two batches.

Notation: n strategies, i sites, k kinds of parts, f = 1 + 2k features, m batches. A part's kind is
its place in its block: attention, MLP; or the block as a whole where parts can't be told apart.

What it does not know: how times were measured (`unicuco.engines.vllm_timer`), and on what.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unicuco.space import CostModel, Shape
from unicuco.types import Part, Strategy


def latency_features(cost: CostModel, strategies: Sequence[Strategy]) -> Tensor:
    """Return the ``n x f`` features of strategies of a space with this cost model."""
    return _features(cost, [cost.shape(strategy.values) for strategy in strategies])


def dense_features(cost: CostModel) -> Tensor:
    """Return the ``1 x f`` features of the dense model."""
    sizes = tuple(site.num_weights for site in cost.profile.sites)
    return _features(cost, [Shape(parts=frozenset(), narrowed=(), sizes=sizes, zeroed=())])


def _features(cost: CostModel, shapes: Sequence[Shape]) -> Tensor:
    """Return ``n x f``: 1, then for every kind the parts that are there and their weights."""
    kinds = _kinds(cost.parts)
    kind_of = {path: k for part, k in zip(cost.parts, kinds, strict=True) for path in part.sites}
    site_kinds = torch.tensor([kind_of[site.path] for site in cost.profile.sites])
    alive = torch.ones(len(shapes), len(kinds), dtype=torch.float64)
    for row, shape in enumerate(shapes):
        alive[row, list(shape.parts)] = 0.0
    sizes = torch.tensor([shape.sizes for shape in shapes], dtype=torch.float64)
    features = torch.zeros(len(shapes), 1 + 2 * (max(kinds) + 1), dtype=torch.float64)
    features[:, 0] = 1.0
    features.index_add_(1, 1 + 2 * torch.tensor(kinds), alive)
    features.index_add_(1, 2 + 2 * site_kinds, sizes)
    return features


def _kinds(parts: Sequence[Part]) -> list[int]:
    """Return the place of every part in its block."""
    kinds: list[int] = []
    for p, part in enumerate(parts):
        is_next = p > 0 and parts[p - 1].block == part.block
        kinds.append(kinds[-1] + 1 if is_next else 0)
    return kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyModel:
    """A fitted model: ``m`` rising batches, and ``m x f`` coefficients, in ms, none below 0.

    Raises:
        ValueError: the two don't fit together.
    """

    batches: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in itertools.pairwise(self.batches))
        if not self.batches or self.batches[0] < 1 or not rising:
            raise ValueError(f"batches must be rising whole numbers above 0, got {self.batches}")
        widths = {len(row) for row in self.coefficients}
        if len(self.coefficients) != len(self.batches) or len(widths) != 1:
            raise ValueError("a latency model needs as many coefficients for every batch")
        if not all(0 <= value < float("inf") for row in self.coefficients for value in row):
            raise ValueError("coefficients of a latency model must be finite and at least 0")

    @classmethod
    def fit(cls, features: Tensor, ms: Tensor, batches: Sequence[int]) -> LatencyModel:
        """Fit one to measurements.

        Args:
            features: ``n x f`` of the strategies that were measured.
            ms: ``n x m`` milliseconds per token, > 0.
            batches: ``m`` rising batches.
        """
        rows = [_fit(features.double(), column) for column in ms.double().T]
        return cls(batches=tuple(batches), coefficients=tuple(rows))

    def covers(self, batch: int) -> bool:
        """Say whether a batch lies among those that were measured."""
        return self.batches[0] <= batch <= self.batches[-1]

    def predict(self, features: Tensor, batch: int) -> Tensor:
        """Return ``n`` milliseconds per token of ``n x f`` features at a batch that is covered."""
        if not self.covers(batch):
            raise ValueError(f"batch {batch} lies outside {self.batches[0]} to {self.batches[-1]}")
        after = next(k for k, own in enumerate(self.batches) if own >= batch)
        before = max(0, after - 1)
        low, high = self.batches[before], self.batches[after]
        way = 1.0 if low == high else (batch - low) / (high - low)
        rows = torch.tensor(self.coefficients, dtype=torch.float64)
        return features.double() @ (rows[before] * (1 - way) + rows[after] * way)

    def to_dict(self) -> dict[str, object]:
        """Return the JSON object that `from_dict` reads back to an equal model."""
        return {
            "batches": list(self.batches),
            "coefficients": [list(row) for row in self.coefficients],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> LatencyModel:  # Any: JSON
        """Read `to_dict`'s object.

        Raises:
            KeyError: a field is missing.
            TypeError: a field is something else.
            ValueError: the fields make no model.
        """
        return cls(
            batches=tuple(int(batch) for batch in document["batches"]),
            coefficients=tuple(tuple(map(float, row)) for row in document["coefficients"]),
        )


def leave_one_out(features: Tensor, ms: Tensor, batches: Sequence[int]) -> Tensor:
    """Return ``n x m`` relative errors, >= 0: of every row, predicted by a fit to all others."""
    errors = torch.zeros_like(ms, dtype=torch.float64)
    for row in range(len(features)):
        others = torch.arange(len(features)) != row
        model = LatencyModel.fit(features[others], ms[others], batches)
        for m, batch in enumerate(batches):
            (predicted,) = model.predict(features[row : row + 1], batch).tolist()
            errors[row, m] = abs(predicted / float(ms[row, m]) - 1)
    return errors


def _fit(features: Tensor, ms: Tensor) -> tuple[float, ...]:
    """Minimise the squares of relative errors over coefficients that are not negative."""
    from scipy.optimize import nnls  # a quarter of a second that only those who fit shall pay

    scale = features.amax(0).clamp(min=1e-12)  # weights are millions, parts a few
    matrix = features / scale / ms[:, None]
    solution, _ = nnls(matrix.numpy(), torch.ones_like(ms).numpy())
    return tuple((torch.from_numpy(solution) / scale).tolist())
