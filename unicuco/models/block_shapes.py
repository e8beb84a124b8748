"""`BlockShape`: what a block of a shrunk model is made of, as ``config.json`` says it.

A shrunk model's configuration has ``block_shapes``, one object per block: ``attention_heads``,
``key_value_heads`` and ``intermediate_size``. 0 heads: the block has no attention, and no norm
before it; an intermediate size of 0: likewise no MLP. What this module does not know: tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

# Families whose blocks can have a shape each: architecture -> (model_type, architecture) of the
# models that do (`unicuco.models.shrunk`, and the vLLM plugin).
SHRUNK_NAMES: Final = {
    "LlamaForCausalLM": ("shrunk_llama", "ShrunkLlamaForCausalLM"),
    "Qwen2ForCausalLM": ("shrunk_qwen2", "ShrunkQwen2ForCausalLM"),
}
_FIELDS: Final = ("attention_heads", "key_value_heads", "intermediate_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """One block. Heads are whole groups: as many query heads for every key and value head."""

    attention_heads: int
    key_value_heads: int
    intermediate_size: int

    def __post_init__(self) -> None:
        heads, groups, width = self.attention_heads, self.key_value_heads, self.intermediate_size
        if min(heads, groups, width) < 0 or (heads == 0) != (groups == 0):
            raise ValueError(f"a block needs heads of both kinds or of none, got {self}")
        if groups and heads % groups:
            raise ValueError(f"attention heads must be a multiple of key and value heads: {self}")
        if not heads and not width:
            raise ValueError("a block without attention and MLP is no block: leave it out")

    @property
    def has_attention(self) -> bool:
        """Whether there is an attention with its norm."""
        return self.attention_heads > 0

    @property
    def has_mlp(self) -> bool:
        """Whether there is an MLP with its norm."""
        return self.intermediate_size > 0

    def to_dict(self) -> dict[str, int]:
        """Return the JSON object."""
        return {name: getattr(self, name) for name in _FIELDS}


def read_shapes(document: object, num_blocks: int) -> tuple[BlockShape, ...]:
    """Read ``block_shapes`` of a configuration.

    Raises:
        ValueError: it is no list of ``num_blocks`` such objects; the line says what is wrong.
    """
    if not isinstance(document, Sequence) or len(document) != num_blocks or not num_blocks:
        raise ValueError(f"block_shapes must be a list of num_hidden_layers = {num_blocks} objects")
    shapes = []
    for block, fields in enumerate(document):
        known = isinstance(fields, Mapping) and set(fields) == set(_FIELDS)
        if not known or not all(type(value) is int for value in fields.values()):
            raise ValueError(
                f"block_shapes[{block}] must give whole numbers for {', '.join(_FIELDS)}, "
                f"got {fields!r}"
            )
        try:
            shapes.append(BlockShape(**fields))
        except ValueError as error:
            raise ValueError(f"block_shapes[{block}]: {error}") from None
    return tuple(shapes)
