"""What a run learned, carried over to a model of the same architecture and another depth or width.

An axis is known by its kind (its site's name without the block's number) and its block's place in
the model. Answers of a run are read at the same relative place of the same kind, linearly in
between; block granularity has one kind. The surrogate of a search that is guided so begins with
what the run's surrogate knows (`unicuco.surrogate.prior`), which measurements of the model itself
confirm or correct. Where that can't be asked, the run's answers are asked first.

What it does not know: where runs lie, and whether a sibling is alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from unicuco.errors import RequestError
from unicuco.space import StrategySpace
from unicuco.surrogate import GaussianProcess, Prior
from unicuco.tensors import named_under

_PRIOR: Final = "prior/"
_BLOCK: Final = re.compile(r"\.(\d+)(?=\.|$)")  # the first number of a name is its block's


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """What another run says of a model.

    Attributes:
        sparsities: ``k`` rising ones.
        points: ``k x d`` unit points, its answers to them.
        prior: what its surrogate says; or none, where that has no curves.
    """

    sparsities: Tensor
    points: Tensor
    prior: Prior | None = None

    def state(self) -> dict[str, Tensor]:
        """Return it as named tensors; `restore` reads them."""
        prior = {} if self.prior is None else self.prior.state()
        named = {_PRIOR + name: tensor for name, tensor in prior.items()}
        return {"sparsities": self.sparsities, "points": self.points, **named}

    @classmethod
    def restore(cls, state: Mapping[str, Tensor]) -> Guide:
        """Rebuild a guide from `state`."""
        prior = named_under(_PRIOR, state)
        return cls(
            sparsities=state["sparsities"],
            points=state["points"],
            prior=Prior.restore(prior) if prior else None,
        )

    def at(self, sparsities: Sequence[float]) -> Tensor:
        """Return the ``n x d`` points for sparsities, linear in between, the ends beyond."""
        return _interpolated(self.sparsities, self.points, torch.tensor(sparsities).double())


def carried_over(source: StrategySpace, target: StrategySpace, points: Tensor) -> Tensor:
    """Return a space's ``k x d`` unit points as ``k x d'`` points of another.

    Raises:
        RequestError: the other space has axes of a kind that this one has not.
    """
    places: dict[str, list[tuple[int, int]]] = {}
    for a, name in enumerate(source.names):
        kind, block = _kind_and_block(name)
        places.setdefault(kind, []).append((block, a))
    depth, old_depth = _num_blocks(target), _num_blocks(source)
    columns = []
    for name in target.names:
        kind, block = _kind_and_block(name)
        if kind not in places:
            raise RequestError(
                f"warm-from needs a run of the same architecture and granularity; it has no {kind}"
            )
        own = sorted(places[kind])
        blocks = torch.tensor([b for b, _ in own], dtype=torch.float64)
        values = points[:, [a for _, a in own]].mT.double()
        at = torch.tensor([(block + 0.5) / depth * old_depth - 0.5], dtype=torch.float64)
        columns.append(_interpolated(blocks, values, at)[0])
    return torch.stack(columns, dim=1)


def make_prior(
    source: StrategySpace, target: StrategySpace, surrogate: GaussianProcess
) -> Prior | None:
    """Return what a fitted surrogate says of a model with another space.

    None where it has no curves, or axes of a kind that the model lacks: it can't be asked there.

    Raises:
        RequestError: the model has axes of a kind that the surrogate knows nothing of.
    """
    mean, d = surrogate.mean_, source.num_axes
    if mean is None or not _kinds(source) <= _kinds(target):
        return None
    by_axis, others = mean.parameters.tensor_split([2 * d])
    by_axis = carried_over(source, target, by_axis.reshape(2, d))
    return Prior(
        other=surrogate.state(),
        places=_reading(source, target),
        centre=torch.cat([by_axis.flatten(), others]),
    )


def _reading(source: StrategySpace, target: StrategySpace) -> Tensor:
    """Return the ``d x d'`` matrix that brings points of the target to the source.

    A block of a shallower source stands for several of the target: it is read at their mean, each
    weighing as much as what is carried over to it comes from there.
    """
    nearest = carried_over(target, source, torch.eye(target.num_axes, dtype=torch.float64))
    if _num_blocks(target) <= _num_blocks(source):
        return nearest
    shares = carried_over(source, target, torch.eye(source.num_axes, dtype=torch.float64)).T
    totals = shares.sum(0)
    return torch.where(totals > 0, shares / totals.clamp(min=1e-12), nearest)


def _kind_and_block(name: str) -> tuple[str, int]:
    found = _BLOCK.search(name)
    if found is None:
        return name, 0
    return f"{name[: found.start()]}.*{name[found.end() :]}", int(found[1])


def _kinds(space: StrategySpace) -> set[str]:
    return {_kind_and_block(name)[0] for name in space.names}


def _num_blocks(space: StrategySpace) -> int:
    return 1 + max(_kind_and_block(name)[1] for name in space.names)


def _interpolated(knots: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Return ``m x w`` rows at ``m`` places between ``n`` rising knots with ``n x w`` values."""
    if len(knots) == 1:
        return values.expand(len(at), -1)
    right = torch.searchsorted(knots, at).clamp(1, len(knots) - 1)
    share = (at - knots[right - 1]) / (knots[right] - knots[right - 1])
    share = share.clamp(0, 1)[:, None]
    return values[right - 1] + share * (values[right] - values[right - 1])
