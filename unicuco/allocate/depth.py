"""What depth pruning does elsewhere: score every part alone, and remove the lowest scores.

- ``shortgpt`` (arXiv 2403.03853): 1 - the cosine between the residual stream before and after;
- ``shortened_llama`` (arXiv 2402.02834): the loss of the model without the part;
- ``subcloning`` (arXiv 2312.09299): the norm of what the part adds, over that of the stream after;
- ``window_cosine`` (Gromov et al., arXiv 2403.17887): parts next to each other, those between whose
  ends the stream turns by the least angle.

Published for whole blocks; a part (attention, MLP) is scored in the same way where axes are parts.
Each removes parts in its order until the budget is met, and gives back the last ones that need not
go. All but ``shortened_llama``, which runs the model once per part, need one pass.

Notation: d axes, boundaries 0 … d between them, t tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from unicuco.calibration import TokenSet
from unicuco.dimensions import Granularity, parts_of
from unicuco.dimensions.depth import Depth
from unicuco.models import block_module
from unicuco.space import StrategySpace
from unicuco.types import ModelProfile, Strategy

if TYPE_CHECKING:
    from unicuco.models import LoadedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class DepthEvidence:
    """The dense model, a space (for depth methods, of depth axes alone), and calibration text."""

    loaded: LoadedModel
    space: StrategySpace
    granularity: Granularity
    calibration: TokenSet


@dataclass(frozen=True, slots=True)
class Streams:
    """The residual stream at the boundaries of blocks or parts, over a text.

    ``cosine`` is ``d+1 x d+1``: mean cosine between the stream at two boundaries. ``added`` is
    ``d``: mean norm of what each adds, over that of the stream after it.
    """

    cosine: Tensor
    added: Tensor


class DepthAllocator:
    """Removes the parts of the lowest scores.

    Args:
        name: of the method.
        evidence: what it looks at.
    """

    def __init__(self, name: str, evidence: DepthEvidence) -> None:
        self.name = name
        self._space = evidence.space
        self._scores = DEPTH_SCORES[name](evidence)

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity over sites, within its budget."""
        rank = self._scores.argsort(stable=True).argsort(stable=True).double()
        unit = torch.sigmoid(1.0 - 2.0 * rank / len(rank))[None]  # the lowest score goes first
        budgets = [self._space.kept_for_sparsity(sparsity) for sparsity in sparsities]
        return self._space.decode_exact(unit.expand(len(sparsities), -1), budgets)


class WindowAllocator:
    """Removes neighbouring parts: for every first part as few as the budget asks, the best of all.

    Args:
        evidence: what it looks at.
    """

    name = "window_cosine"

    def __init__(self, evidence: DepthEvidence) -> None:
        self._space = evidence.space
        self._angle = torch.arccos(measure_streams(evidence).cosine.clamp(-1, 1)) / torch.pi

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity over sites, within its budget."""
        return [self._window(self._space.kept_for_sparsity(sparsity)) for sparsity in sparsities]

    def _window(self, budget: int) -> Strategy:
        d = self._space.num_axes
        best: tuple[float, Tensor] | None = None
        for first in range(d):
            lasts = range(first, min(d, first + d - 1) + 1)
            rows = torch.zeros(len(lasts), d, dtype=torch.float64)
            for row, last in zip(rows, lasts, strict=True):
                row[first:last] = 1.0
            fits = (self._space.cost.kept(rows) <= budget + 0.5).nonzero()[:, 0].tolist()
            if fits and (best is None or float(self._angle[first, lasts[fits[0]]]) < best[0]):
                best = float(self._angle[first, lasts[fits[0]]]), rows[fits[0]]
        if best is None:  # not even all but one end are few enough
            return self._space.decode_exact(torch.full((1, d), 0.5), [budget])[0]
        return self._space.decode(best[1][None])[0]


@torch.no_grad()
def measure_streams(evidence: DepthEvidence) -> Streams:
    """Run the calibration text once and compare the stream at the boundaries of blocks or parts."""
    loaded, by_block = evidence.loaded, evidence.granularity is Granularity.BLOCK
    d = loaded.profile.num_blocks if by_block else len(parts_of(loaded.profile))
    cosine = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    added = torch.zeros(d, dtype=torch.float64)
    for batch in evidence.calibration.batches():
        states = torch.stack(_states(loaded.model, loaded.profile, evidence.granularity, batch))
        directions = normalize(states, dim=-1)
        cosine += torch.einsum("ath,bth->ab", directions, directions).double()
        steps = (states[1:] - states[:-1]).norm(dim=-1)
        added += (steps / states[1:].norm(dim=-1).clamp(min=1e-12)).sum(1).double()
    tokens = evidence.calibration.num_tokens
    return Streams(cosine / tokens, added / tokens)


def _states(
    model: nn.Module, profile: ModelProfile, granularity: Granularity, ids: Tensor
) -> list[Tensor]:
    """Return the stream at every boundary, ``t x h`` each."""
    states: list[Tensor] = []
    parts = parts_of(profile)

    # Any: blocks and parts take and return what their family does.
    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not states:
            states.append(hidden.flatten(0, 1).float())

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(hidden.flatten(0, 1).float())

    def add(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(states[-1] + hidden.flatten(0, 1).float())

    with ExitStack() as hooks:
        first = block_module(model, profile, 0)
        hooks.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
        if granularity is Granularity.BLOCK:
            for block in range(profile.num_blocks):
                module = block_module(model, profile, block)
                hooks.callback(module.register_forward_hook(leave).remove)
        else:
            for part in parts:
                module = model.get_submodule(part.path)
                hooks.callback(module.register_forward_hook(add).remove)
        model(input_ids=ids, use_cache=False)
    return states


def _cosine_scores(evidence: DepthEvidence) -> Tensor:
    return 1.0 - measure_streams(evidence).cosine.diagonal(1)


def _norm_scores(evidence: DepthEvidence) -> Tensor:
    return measure_streams(evidence).added


@torch.no_grad()
def _loss_scores(evidence: DepthEvidence) -> Tensor:
    model, profile = evidence.loaded.model, evidence.loaded.profile
    depth, d = Depth(), evidence.space.num_axes
    losses = []
    try:
        for axis in range(d):
            alone = [float(a == axis) for a in range(d)]
            depth.apply(model, profile, alone, evidence.granularity)
            loss = 0.0
            for ids in evidence.calibration.batches():
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                loss += float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
            losses.append(loss)
    finally:
        depth.apply(model, profile, [0.0] * d, evidence.granularity)
    return torch.tensor(losses, dtype=torch.float64)


DEPTH_SCORES: Final[dict[str, Callable[[DepthEvidence], Tensor]]] = {
    "shortgpt": _cosine_scores,
    "shortened_llama": _loss_scores,
    "subcloning": _norm_scores,
}
