"""Configurations of Llama- and Qwen2-shaped models whose blocks differ in shape.

``config.json`` is the dense model's with another ``model_type``, as many ``num_hidden_layers`` as
there are blocks left, ``block_shapes`` and, where heads are narrower inside, ``rotary_pairs``
(`unicuco.models.block_shapes`). What this module does not know: the models themselves.
"""

from __future__ import annotations

from typing import Any, Final

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from unicuco.models.block_shapes import BlockShape, read_pairs, read_shapes


@strict
class ShrunkLlamaConfig(LlamaConfig):
    """Llama with ``block_shapes``."""

    model_type = "shrunk_llama"
    block_shapes: list[dict[str, int]] | None = None
    rotary_pairs: list[list[list[int]] | None] | None = None

    # Any: fields of every configuration.
    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        pairs_of(self)

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases; Llama's outputs then have one too."""
        return bool(self.attention_bias)


@strict
class ShrunkQwen2Config(Qwen2Config):
    """Qwen2 with ``block_shapes`` and a head size of its own."""

    model_type = "shrunk_qwen2"
    block_shapes: list[dict[str, int]] | None = None
    rotary_pairs: list[list[list[int]] | None] | None = None
    head_dim: int | None = None

    # Any: fields of every configuration.
    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if set(self.layer_types or ()) > {"full_attention"}:
            raise ValueError("blocks of different shapes know full attention only")
        pairs_of(self)

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases: always."""
        return True


CONFIGS: Final = (ShrunkLlamaConfig, ShrunkQwen2Config)


def shapes_of(config: PreTrainedConfig) -> tuple[BlockShape, ...]:
    """Return the shape of every block of a shrunk model's configuration.

    Raises:
        ValueError: ``block_shapes`` does not describe its blocks.
    """
    blocks = int(config.num_hidden_layers)
    plain = BlockShape(
        attention_heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
    )
    if config.block_shapes is None:
        return (plain,) * blocks
    return read_shapes(config.block_shapes, blocks)


def pairs_of(config: PreTrainedConfig) -> tuple[tuple[tuple[int, ...], ...] | None, ...]:
    """Return every block's rotary pairs by key and value head, or none where all are held.

    Raises:
        ValueError: ``rotary_pairs`` or sizes of heads don't fit the blocks.
    """
    return read_pairs(config.rotary_pairs, shapes_of(config), int(config.head_dim))


def register_configs() -> None:
    """Let ``AutoConfig`` know the configurations; doing it twice is allowed."""
    for kind in CONFIGS:
        AutoConfig.register(kind.model_type, kind, exist_ok=True)
