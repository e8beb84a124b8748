"""`BlockShape`: what a block of a shrunk model is made of, as ``config.json`` says it.

A shrunk model's configuration has ``block_shapes``, one object per block: ``attention_heads``,
``key_value_heads`` and ``intermediate_size``. 0 heads: the block has no attention, and no norm
before it; an intermediate size of 0: likewise no MLP. Where heads are narrower inside, it also says
``query_key_size`` and ``value_size``, what the matrices hold of every head; then ``rotary_pairs``
of the configuration has, for every block with fewer queries and keys, the pairs of every key and
value head that are there: pair p is the coordinates p and p + ``head_dim`` / 2.

Inside attention such heads have their whole size, zero where nothing is held: rotary embedding,
kernels and the cache are the dense model's. What this module does not know: tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

# Families whose blocks can have a shape each: architecture -> (model_type, architecture) of the
# models that do (`unicuco.models.shrunk`, and the vLLM plugin).
SHRUNK_NAMES: Final = {
    "LlamaForCausalLM": ("shrunk_llama", "ShrunkLlamaForCausalLM"),
    "Qwen2ForCausalLM": ("shrunk_qwen2", "ShrunkQwen2ForCausalLM"),
}
_FIELDS: Final = ("attention_heads", "key_value_heads", "intermediate_size")
_HEAD_FIELDS: Final = ("query_key_size", "value_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """One block. Heads are whole groups: as many query heads for every key and value head.

    ``query_key_size`` and ``value_size`` are what is held of every head; none: all.
    """

    attention_heads: int
    key_value_heads: int
    intermediate_size: int
    query_key_size: int | None = None
    value_size: int | None = None

    def __post_init__(self) -> None:
        sizes = [size for size in (self.query_key_size, self.value_size) if size is not None]
        if sizes and (min(sizes) < 1 or not self.attention_heads):
            raise ValueError(f"what is held of a head must be at least 1, got {self}")
        if self.query_key_size is not None and self.query_key_size % 2:
            raise ValueError(f"queries and keys are held by rotary pairs, two each: {self}")
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
        named = {name: getattr(self, name) for name in (*_FIELDS, *_HEAD_FIELDS)}
        return {name: value for name, value in named.items() if value is not None}


def read_shapes(document: object, num_blocks: int) -> tuple[BlockShape, ...]:
    """Read ``block_shapes`` of a configuration.

    Raises:
        ValueError: it is no list of ``num_blocks`` such objects; the line says what is wrong.
    """
    if not isinstance(document, Sequence) or len(document) != num_blocks or not num_blocks:
        raise ValueError(f"block_shapes must be a list of num_hidden_layers = {num_blocks} objects")
    shapes = []
    for block, fields in enumerate(document):
        known = isinstance(fields, Mapping) and set(fields) - set(_HEAD_FIELDS) == set(_FIELDS)
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


def read_pairs(
    document: object, shapes: Sequence[BlockShape], head_size: int
) -> tuple[tuple[tuple[int, ...], ...] | None, ...]:
    """Read ``rotary_pairs`` of a configuration.

    Args:
        document: what it says; none where no block needs any.
        shapes: of its blocks.
        head_size: of the dense heads.

    Returns:
        For every block the pairs of every key and value head, or none where all are held.

    Raises:
        ValueError: sizes or pairs don't fit; the line says which.
    """
    listed = document if isinstance(document, Sequence) else [None] * len(shapes)
    if len(listed) != len(shapes):
        raise ValueError(f"rotary_pairs must be a list of {len(shapes)} blocks' pairs or nulls")
    found: list[tuple[tuple[int, ...], ...] | None] = []
    for block, (given, shape) in enumerate(zip(listed, shapes, strict=True)):
        if max(shape.query_key_size or 0, shape.value_size or 0) > head_size:
            raise ValueError(f"block_shapes[{block}] holds more than head_dim = {head_size}")
        if shape.query_key_size is None:
            found.append(None)
            continue
        count = shape.query_key_size // 2
        if not _are_pairs(given, shape.key_value_heads, count, head_size // 2):
            raise ValueError(
                f"rotary_pairs[{block}] must give {shape.key_value_heads} lists of {count} rising "
                f"numbers below {head_size // 2}"
            )
        found.append(tuple(tuple(pairs) for pairs in given))
    return tuple(found)


# Any: what a configuration holds.
def _are_pairs(given: Any, heads: int, count: int, below: int) -> bool:
    if not isinstance(given, Sequence) or len(given) != heads:
        return False
    return all(
        isinstance(pairs, Sequence)
        and all(type(pair) is int and 0 <= pair < below for pair in pairs)
        and list(pairs) == sorted(set(pairs))
        and len(pairs) == count
        for pairs in given
    )


def held_lines(
    shape: BlockShape, pairs: Sequence[Sequence[int]] | None, head_size: int
) -> dict[str, list[int]]:
    """Return where the lines that matrices hold stand among those of the dense heads.

    Args:
        shape: of the block.
        pairs: of every key and value head; none: all.
        head_size: of the dense heads.

    Returns:
        For ``query``, ``key``, ``value`` and ``output`` as many numbers as that matrix has lines.
    """
    groups, half = shape.key_value_heads, head_size // 2
    per_group = shape.attention_heads // groups
    inside = [list(range(head_size))] * groups
    if pairs is not None:
        inside = [[*own, *(pair + half for pair in own)] for own in pairs]
    ranks = range(shape.value_size or head_size)
    return {
        "query": _lines([own for own in inside for _ in range(per_group)], head_size),
        "key": _lines(inside, head_size),
        "value": _lines([ranks] * groups, head_size),
        "output": _lines([ranks] * shape.attention_heads, head_size),
    }


def _lines(heads: Sequence[Sequence[int]], head_size: int) -> list[int]:
    return [head * head_size + line for head, own in enumerate(heads) for line in own]
