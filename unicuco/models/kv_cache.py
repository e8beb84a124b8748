"""The cache of keys and values: its shape in a model, and one that rounds what it is given.

What it does not know: what a number of bits costs (`unicuco.bits` does), and engines' own caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from unicuco.bits import pack_vectors, round_vectors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def cached_heads(
    model: PreTrainedModel, ids: Tensor, num_blocks: int
) -> tuple[tuple[int, int], ...]:
    """Return the heads that each block caches keys and values of, and their size.

    Args:
        model: runs once.
        ids: ``1 x t`` tokens.
        num_blocks: of the model.

    Returns:
        (heads, size) of every block; empty where the model keeps another kind of cache.
    """
    try:
        cache = model(input_ids=ids.to(model.device), use_cache=True).past_key_values
        shapes = [layer.keys.shape for layer in cache.layers]
    except (AttributeError, TypeError, ValueError):  # no cache, or one of another kind
        return ()
    if len(shapes) != num_blocks or any(len(shape) != 4 for shape in shapes):
        return ()
    return tuple((int(heads), int(size)) for _, heads, _, size in shapes)


class RoundedCache(DynamicCache):
    """A cache whose keys and values are rounded as they come in, to so many bits in each block.

    Args:
        bits: of every block; 16 changes nothing.
        measure: also pack what comes in, and count it in ``num_bytes``.
    """

    def __init__(self, bits: Sequence[int], *, measure: bool = False) -> None:
        super().__init__()
        self._bits = tuple(bits)
        self._measure = measure
        self.num_bytes = 0

    # Any: keywords that families hand to their caches.
    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Round, remember, and return all keys and values of a block, ``b x h x t x d`` each."""
        bits = self._bits[layer_idx]
        if self._measure:
            states = (key_states, value_states)
            self.num_bytes += sum(len(pack_vectors(x, bits)) for x in states)
        keys, values = super().update(
            round_vectors(key_states, bits),
            round_vectors(value_states, bits),
            layer_idx,
            *args,
            **kwargs,
        )
        return keys, values
