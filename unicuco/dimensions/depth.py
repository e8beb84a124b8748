"""Depth: whole transformer blocks removed. Served as smaller shapes.

Minimal so far: a block is kept or skipped exactly. Sub-modules and export of the smaller shapes
come with the shrinking dimensions; until then only the evaluator applies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unicuco.dimensions.base import Granularity
from unicuco.models import block_module
from unicuco.space import Axis
from unicuco.types import ModelProfile, ServedAs

if TYPE_CHECKING:
    from torch import nn

_HOOK = "_unicuco_skip_hook"


class Depth:
    """One yes-or-no axis per block: 1 removes it."""

    name = "depth"
    served_as = ServedAs.SHRINK
    must_follow: frozenset[str] = frozenset()

    def axes(self, profile: ModelProfile, granularity: Granularity) -> list[Axis]:
        """Return one choice per block, at either granularity."""
        return [
            Axis(name=f"{self.name}/block.{b}", low=0.0, high=1.0, num_steps=1)
            for b in range(profile.num_blocks)
        ]

    def factors(
        self, profile: ModelProfile, settings: Tensor, granularity: Granularity
    ) -> tuple[Tensor, Tensor]:
        """Return 1 per site, and 1 - removed per block."""
        return torch.ones(len(settings), len(profile.sites), dtype=settings.dtype), 1.0 - settings

    def site_drops(
        self, profile: ModelProfile, values: Sequence[float], granularity: Granularity
    ) -> dict[str, int]:
        """Return nothing: removed blocks are counted whole by the cost model."""
        return {}

    def removed_blocks(self, profile: ModelProfile, values: Sequence[float]) -> frozenset[int]:
        """Return the blocks whose choice is 1."""
        return frozenset(block for block, value in enumerate(values) if value >= 0.5)

    def apply(self, model: nn.Module, profile: ModelProfile, values: Sequence[float]) -> None:
        """Make removed blocks pass their input on unchanged, and all others work again."""
        removed = self.removed_blocks(profile, values)
        for block in range(profile.num_blocks):
            module = block_module(model, profile, block)
            handle = module.__dict__.pop(_HOOK, None)
            if handle is not None:
                handle.remove()
            if block in removed:
                module.__dict__[_HOOK] = module.register_forward_hook(
                    _pass_input_on, with_kwargs=True
                )


def _pass_input_on(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    # Any: a block returns a tensor or a tuple that starts with it, whatever the family.
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
