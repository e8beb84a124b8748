"""Depth: whole blocks, or their attention and MLP, removed. Served as smaller shapes.

At granularity ``block`` an axis is a block; at ``layer`` it is a part: a sub-module with its norm,
whose output is no longer added to the residual stream. A block that loses all its parts is gone as
a whole: the two granularities describe the same models where they can.

What it does not know: whether an engine can run the shape (`unicuco.export.shrunk` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from unicuco.dimensions.base import Dimension, Granularity, Kept, parts_of
from unicuco.errors import RequestError
from unicuco.models import block_module, silence
from unicuco.space import Axis
from unicuco.types import ModelProfile, ServedAs

if TYPE_CHECKING:
    from torch import nn

_HOOK: Final = "_unicuco_skip_hook"


class Depth(Dimension):
    """One yes-or-no axis per block or per part: 1 removes it."""

    name = "depth"
    served_as = ServedAs.SHRINK
    must_follow: frozenset[str] = frozenset()
    has_slopes = True

    def axes(self, profile: ModelProfile, granularity: Granularity) -> list[Axis]:
        """Return one choice per block, or per part in part order."""
        if granularity is Granularity.BLOCK:
            names = [f"block.{block}" for block in range(profile.num_blocks)]
        elif profile.parts:
            names = [part.path for part in profile.parts]
        else:
            raise RequestError(
                f"the sub-modules of {profile.architecture} can't be told apart, so depth is of "
                "whole blocks here: give --granularity block"
            )
        return [
            Axis(name=f"{self.name}/{name}", low=0.0, high=1.0, num_steps=1, is_shape=True)
            for name in names
        ]

    def kept(self, profile: ModelProfile, settings: Tensor, granularity: Granularity) -> Kept:
        """Return 1 - removed per part."""
        alive = 1.0 - settings
        if granularity is Granularity.BLOCK:
            alive = alive[:, [part.block for part in parts_of(profile)]]
        return Kept(alive=alive)

    def removed_parts(
        self, profile: ModelProfile, values: Sequence[float], granularity: Granularity
    ) -> frozenset[int]:
        """Return the parts whose own choice, or whose block's, is 1."""
        parts = parts_of(profile)
        if granularity is Granularity.BLOCK:
            values = [values[part.block] for part in parts]
        return frozenset(p for p, value in enumerate(values) if value >= 0.5)

    def apply(
        self,
        model: nn.Module,
        profile: ModelProfile,
        values: Sequence[float],
        granularity: Granularity,
    ) -> None:
        """Make what is removed add nothing to the residual stream, and all else work again."""
        removed = self.removed_parts(profile, values, granularity)
        for p, part in enumerate(parts_of(profile)):
            module = model.get_submodule(part.path)
            _undo(module)
            if p in removed and profile.parts:
                module.__dict__[_HOOK] = silence(module)
            elif p in removed:
                block = block_module(model, profile, part.block)
                block.__dict__[_HOOK] = block.register_forward_hook(
                    _pass_input_on, with_kwargs=True
                )


def _undo(module: nn.Module) -> None:
    handle = module.__dict__.pop(_HOOK, None)
    if handle is not None:
        handle.remove()


def _pass_input_on(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    # Any: a block returns a tensor or a tuple that starts with it, whatever the family.
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
