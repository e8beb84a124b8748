"""What allocators share that learn masks by gradient on frozen weights: BESA, Lua, AdapMTL.

Masked weights take the sites' places for one call only, so that the model itself never changes and
only what was given for learning has gradients.

Notation: b requests, d axes, o rows and i columns of a site, t tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unicuco.allocate.evidence import Evidence
from unicuco.dimensions import Granularity
from unicuco.errors import AllocationError, InfeasibleRequestError
from unicuco.memory import free_bytes
from unicuco.space import StrategySpace
from unicuco.types import Site, Strategy


def check_reachable(space: StrategySpace, sparsities: Sequence[float]) -> None:
    """Refuse, before anything is learned, what no strategy of the space can meet.

    Raises:
        InfeasibleRequestError: a sparsity beyond what the space reaches.
    """
    fewest, _ = space.kept_range()
    low = min((space.kept_for_sparsity(sparsity) for sparsity in sparsities), default=fewest)
    if low < fewest:
        raise InfeasibleRequestError(
            f"no strategy keeps only {low:,} parameters; the fewest are {fewest:,}",
            nearest=float(fewest),
        )


def check_memory(name: str, num_bytes: int, *, available: int | None = None) -> None:
    """Refuse to begin what would not fit into memory.

    Args:
        name: of the allocator.
        num_bytes: what its masks, gradients and copies take.
        available: bytes that are free; none: all that this process may take.

    Raises:
        AllocationError: they don't fit.
    """
    free = free_bytes() if available is None else available
    if num_bytes > free:
        raise AllocationError(
            f"{name} needs gradients of this model, about {num_bytes / 2**30:.1f} GiB beside it, "
            f"and {free / 2**30:.1f} GiB are free; take an allocator without gradients, e.g. owl"
        )


def check_finite(name: str, loss: Tensor) -> Tensor:
    """Return the loss.

    Raises:
        AllocationError: it is NaN or infinite.
    """
    if not bool(torch.isfinite(loss)):
        raise AllocationError(
            f"the loss of {name} became {float(loss.detach())} on the calibration text; "
            "the model overflows there: give another text or allocator"
        )
    return loss


def windows_in_turn(num_windows: int, steps: int, generator: torch.Generator) -> Iterator[int]:
    """Yield the window of every step: all of them in random order, again and again."""
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(num_windows, generator=generator).tolist()
        yield order.pop()


def descend(name: str, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one step down a loss.

    Raises:
        AllocationError: the loss of the allocator ``name`` is NaN or infinite.
    """
    optimizer.zero_grad()
    check_finite(name, loss).backward()
    optimizer.step()


def token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean next-token cross entropy of ``n x t x v`` logits on ``n x t`` tokens."""
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


# Any: arguments and results of other people's modules.
def call_with_weights(
    module: nn.Module, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Call a module as if parameters had other values; its own stay untouched.

    Args:
        module: a whole model or one block.
        weights: parameter path inside ``module`` -> value, shaped as the module stores it.
        args: passed on.
        kwargs: passed on.
    """
    return torch.func.functional_call(module, dict(weights), args, kwargs)


def stored(matrix: Tensor, site: Site) -> Tensor:
    """Return an ``o x i`` matrix the way round that the site's module stores it."""
    return matrix.T if site.transposed else matrix


def site_strategies(
    space: StrategySpace,
    evidence: Evidence,
    sparsities: Sequence[float],
    fractions: Sequence[Tensor],
) -> list[Strategy]:
    """Return the strategies nearest to learned sparsities of the sites, each exactly on its budget.

    Args:
        space: axes of other dimensions stay at their low end.
        evidence: names the sites and the granularity of the axes.
        sparsities: of b requests.
        fractions: per request the sparsity of every site, in site order; a block's axis takes the
            mean of its sites by their weights.

    Raises:
        InfeasibleRequestError: a sparsity beyond what the space reaches.
    """
    axes = _axis_sites(evidence)
    unit = torch.zeros(len(sparsities), space.num_axes, dtype=torch.float64)
    sizes = torch.tensor([site.num_weights for site in evidence.profile.sites]).double()
    for index, axis in enumerate(space.axes):
        places = axes.get(axis.name)
        if places is None:
            continue
        share = sizes[places] / sizes[places].sum()
        for row, values in enumerate(fractions):
            setting = float((values.double()[places] * share).sum())
            unit[row, index] = (setting - axis.low) / (axis.high - axis.low)
    budgets = [space.kept_for_sparsity(sparsity) for sparsity in sparsities]
    return space.decode_exact(unit.clamp(0, 1), budgets)


def _axis_sites(evidence: Evidence) -> dict[str, list[int]]:
    """Return which sites, by position, every sparsity axis decides."""
    sites = evidence.profile.sites
    if evidence.granularity is Granularity.LAYER:
        return {f"sparsity/{site.path}": [k] for k, site in enumerate(sites)}
    axes: dict[str, list[int]] = {}
    for k, site in enumerate(sites):
        axes.setdefault(f"sparsity/block.{site.block}", []).append(k)
    return axes
