"""BESA, layer version: learned sparsities inside every block, one block after the other.

Every site has a softmax over candidate sparsities 0, 0.01, … 1; its sparsity is their mean. A
weight's probability to be kept is that of the candidates that spare its rank, and the hard mask at
the mean sparsity passes its gradient straight through to it. A block minimises the error of its
outputs against its own dense outputs on the same inputs, relative per feature, plus β times the
squared relative deviation from the target; the next block's inputs come from the pruned one (Xu et
al., ICLR 2024; the released code's loss). Weights stay as they are.

Where it departs: Adam, since Prodigy is not at hand; the drop order is the run's, instead of new
statistics behind every pruned block; logits begin at the flattest distribution whose mean is the
target (at one half that is the published start); and without the released sigmoid over the logits,
whose mean can't exceed 0.62. What it does not know: which block deserves more than another, for
every block aims at the target itself.

Notation: n windows, t tokens, h hidden size, m sites of a block, c = 101 candidates, i ranks of a
row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from unicuco.allocate.base import AllocationContext
from unicuco.allocate.evidence import Evidence
from unicuco.allocate.learned import (
    call_with_weights,
    check_memory,
    check_reachable,
    descend,
    site_strategies,
    stored,
    windows_in_turn,
)
from unicuco.models import block_module
from unicuco.ranks import keep_mask
from unicuco.types import Site, Strategy

_CANDIDATES: Final = torch.arange(101, dtype=torch.float32) / 100
_BYTES_PER_WEIGHT: Final = 4 * 4  # of one block: mask, masked weight and the gradient of both
# Any: a block's arguments beside its input, whatever the family passes.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BesaOptions:
    """``steps`` per block, a window each (published: one epoch of 128); ``beta`` is published.

    ``learning_rate`` was chosen on validation text (`benchmarks.rates`).
    """

    steps: int = 128
    beta: float = 5.0
    learning_rate: float = 0.05


class Besa:
    """BESA by layers (see the module's docstring); learns anew for every target."""

    name = "besa"

    def __init__(self, context: AllocationContext, options: BesaOptions | None = None) -> None:
        self._space = context.space
        self._evidence = context.require_evidence(self.name)
        self._options = options or BesaOptions()
        self._learned: dict[float, Tensor] = {}

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity.

        Raises:
            InfeasibleRequestError: a sparsity beyond what the space reaches.
            AllocationError: gradients don't fit into memory, or a loss is not finite.
        """
        check_reachable(self._space, sparsities)
        fractions = [self.site_sparsities(sparsity) for sparsity in sparsities]
        return site_strategies(self._space, self._evidence, sparsities, fractions)

    def site_sparsities(self, target: float) -> Tensor:
        """Return what is learned for a target before projection: every site's sparsity."""
        if target not in self._learned:
            self._learned[target] = _learn(self._evidence, target, self._options)
        return self._learned[target]


def candidate_logits(mean: float) -> Tensor:
    """Return the 101 logits of the flattest distribution over candidates with this mean."""
    wanted = min(max(mean, 0.005), 0.995)
    low, high = -2000.0, 2000.0
    for _ in range(100):
        tilt = (low + high) / 2
        if float(((tilt * _CANDIDATES).softmax(0) * _CANDIDATES).sum()) < wanted:
            low = tilt
        else:
            high = tilt
    return high * _CANDIDATES


def straight_through_mask(logits: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Return a site's ``o x i`` mask of zeros and ones, and its sparsity.

    Args:
        logits: ``c`` over candidates.
        rank: ``o x i`` drop order within rows.

    Returns:
        Mask and sparsity; both pass gradients to the logits, the mask through the probability that
        a weight of its rank is kept.
    """
    p = logits.softmax(0)
    sparsity = (p * _CANDIDATES).sum()
    columns = rank.shape[1]
    # Rank r is spared by the candidates c with c i <= r.
    spared = (100 * torch.arange(columns)) // columns
    soft = p.cumsum(0)[spared][rank.long()]  # (o, i)
    hard = keep_mask(rank, round(float(sparsity.detach()) * rank.numel())).to(soft.dtype)
    return hard + soft - soft.detach(), sparsity


def _learn(evidence: Evidence, target: float, options: BesaOptions) -> Tensor:
    profile = evidence.profile
    blocks = [[s for s in profile.sites if s.block == b] for b in range(profile.num_blocks)]
    largest = max(sum(site.num_weights for site in sites) for sites in blocks)
    check_memory(Besa.name, largest * _BYTES_PER_WEIGHT)
    inputs, calls = _first_inputs(evidence)
    learned: dict[str, float] = {}
    for number, sites in enumerate(blocks):
        block = _Block(evidence, number, sites, calls[number])
        found, inputs = block.learn(inputs, target, options)
        learned |= found
    return torch.tensor([learned[site.path] for site in profile.sites], dtype=torch.float64)


class _Block:
    """One block with its sites, called window by window."""

    def __init__(
        self, evidence: Evidence, number: int, sites: Sequence[Site], calls: Sequence[_Call]
    ) -> None:
        self._module = block_module(evidence.loaded.model, evidence.profile, number)
        prefix = f"{evidence.profile.block_paths[number]}."
        self._names = [f"{site.path}.weight".removeprefix(prefix) for site in sites]
        self._sites = sites
        self._weights = [evidence.weight(site) for site in sites]
        self._ranks = [evidence.ranks.ranks[site.path] for site in sites]
        self._calls = calls
        self._order = torch.Generator().manual_seed(evidence.seed)

    def learn(
        self, inputs: list[Tensor], target: float, options: BesaOptions
    ) -> tuple[dict[str, float], list[Tensor]]:
        """Learn the sites' sparsities; return them and the pruned block's outputs."""
        with torch.no_grad():
            wanted = [self._run(k, x, None) for k, x in enumerate(inputs)]
        logits = candidate_logits(target).repeat(len(self._sites), 1).requires_grad_(True)
        optimizer = torch.optim.Adam([logits], lr=options.learning_rate)
        with torch.enable_grad():
            for k in windows_in_turn(len(inputs), options.steps, self._order):
                masks, sparsity = self._masks(logits)
                error = _relative_error(self._run(k, inputs[k], masks), wanted[k])
                deviation = (sparsity - target) / max(target, 0.01)
                descend(Besa.name, optimizer, error + options.beta * deviation.square())
        with torch.no_grad():
            masks, _ = self._masks(logits)
            outputs = [self._run(k, x, masks) for k, x in enumerate(inputs)]
            means = (logits.softmax(1) * _CANDIDATES).sum(1).tolist()
        return {s.path: mean for s, mean in zip(self._sites, means, strict=True)}, outputs

    def _masks(self, logits: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return every site's mask and the block's sparsity."""
        pairs = [
            straight_through_mask(row, rank) for row, rank in zip(logits, self._ranks, strict=True)
        ]
        sizes = torch.tensor([float(rank.numel()) for rank in self._ranks])
        sparsity = (torch.stack([s for _, s in pairs]) * sizes).sum() / sizes.sum()
        return [mask for mask, _ in pairs], sparsity

    def _run(self, window: int, inputs: Tensor, masks: list[Tensor] | None) -> Tensor:
        args, kwargs = self._calls[window]
        weights: dict[str, Tensor] = {}
        for k, mask in enumerate(masks or []):
            weights[self._names[k]] = stored(self._weights[k] * mask, self._sites[k])
        output = call_with_weights(self._module, weights, inputs, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def _relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the squared error of ``1 x t x h`` outputs over each feature's own, on average."""
    scale = wanted.float().square().sum((0, 1)).clamp(min=1e-12)
    return ((found.float() - wanted.float()).square().sum((0, 1)) / scale).mean()


@torch.no_grad()
def _first_inputs(evidence: Evidence) -> tuple[list[Tensor], list[list[_Call]]]:
    """Return the first block's input of every window, and what every block gets beside its own."""
    model, profile = evidence.loaded.model, evidence.profile
    inputs: list[Tensor] = []
    calls: list[list[_Call]] = [[] for _ in range(profile.num_blocks)]

    def watch(block: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            first = args[0] if args else kwargs.pop("hidden_states")
            if block == 0:
                inputs.append(first.detach())
            calls[block].append((tuple(args[1:]), kwargs))

        return hook

    with ExitStack() as hooks:
        for block in range(profile.num_blocks):
            module = block_module(model, profile, block)
            handle = module.register_forward_pre_hook(watch(block), with_kwargs=True)
            hooks.callback(handle.remove)
        for window in evidence.calibration.ids.split(1):
            model(input_ids=window.to(model.device), use_cache=False)
    return inputs, calls
