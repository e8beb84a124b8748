"""Transformers models whose blocks differ in shape: Llama and Qwen2 with narrower and fewer parts.

Attention, MLP, norm, rotary embedding and everything around the blocks are Transformers' own; here
are only blocks in which a part may be missing, made of the sizes that the configuration gives, and
matrices that hold fewer lines than attention's heads have.
`unicuco` registers the classes as soon as the automatic classes are there, so that
``AutoModelForCausalLM.from_pretrained`` loads such a folder once ``unicuco`` is imported.

Attentions are numbered among themselves, not by block: the cache's first entry, from which
Transformers reads how long it is, is then always one that is written.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2ForCausalLM,
    Qwen2MLP,
    Qwen2Model,
    Qwen2RMSNorm,
)

from unicuco.models.block_shapes import BlockShape, held_lines
from unicuco.models.held_lines import HeldColumns, HeldRows
from unicuco.models.shrunk_config import (
    ShrunkLlamaConfig,
    ShrunkQwen2Config,
    pairs_of,
    register_configs,
    shapes_of,
)

Config = TypeVar("Config", ShrunkLlamaConfig, ShrunkQwen2Config)


class ShrunkBlock(GradientCheckpointingLayer):
    """A block in which attention or MLP, with its norm, may be missing."""

    attention: type[nn.Module]
    feed_forward: type[nn.Module]
    norm: type[nn.Module]

    def __init__(
        self,
        config: PreTrainedConfig,
        shape: BlockShape,
        pairs: tuple[tuple[int, ...], ...] | None,
        attention_index: int,
    ) -> None:
        super().__init__()
        own = copy.copy(config)
        if shape.has_attention:
            own.num_attention_heads = shape.attention_heads
            own.num_key_value_heads = shape.key_value_heads
            self.input_layernorm = self.norm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = self.attention(own, attention_index)
            _hold_lines(self.self_attn, shape, pairs)
            # One place says which attention kernel is used.
            object.__setattr__(self.self_attn, "config", config)
        if shape.has_mlp:
            own.intermediate_size = shape.intermediate_size
            self.post_attention_layernorm = self.norm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = self.feed_forward(own)
        self._shape = shape

    # Any: Transformers' keywords travel through.
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Add what the parts that are there say of the stream to it."""
        if self._shape.has_attention:
            attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + attended
        if self._shape.has_mlp:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class ShrunkLlamaBlock(ShrunkBlock):
    """Of Llama's parts."""

    attention, feed_forward, norm = LlamaAttention, LlamaMLP, LlamaRMSNorm


class ShrunkQwen2Block(ShrunkBlock):
    """Of Qwen2's parts."""

    attention, feed_forward, norm = Qwen2Attention, Qwen2MLP, Qwen2RMSNorm


class ShrunkLlamaModel(LlamaModel):
    """Llama without its head."""

    config_class = ShrunkLlamaConfig
    _no_split_modules = ["ShrunkLlamaBlock"]  # noqa: RUF012 - as Transformers has it
    _can_record_outputs = {  # noqa: RUF012 - as Transformers has it
        "hidden_states": ShrunkLlamaBlock,
        "attentions": LlamaAttention,
    }

    def __init__(self, config: ShrunkLlamaConfig) -> None:
        super().__init__(_without_blocks(config))
        _take_shapes(self, config, ShrunkLlamaBlock)


class ShrunkLlamaForCausalLM(LlamaForCausalLM):
    """Llama whose blocks have the shapes that its configuration gives."""

    config_class = ShrunkLlamaConfig
    _no_split_modules = ["ShrunkLlamaBlock"]  # noqa: RUF012 - as Transformers has it

    def __init__(self, config: ShrunkLlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        _take_body(self, ShrunkLlamaModel(config), config)


class ShrunkQwen2Model(Qwen2Model):
    """Qwen2 without its head."""

    config_class = ShrunkQwen2Config
    _no_split_modules = ["ShrunkQwen2Block"]  # noqa: RUF012 - as Transformers has it
    _can_record_outputs = {  # noqa: RUF012 - as Transformers has it
        "hidden_states": ShrunkQwen2Block,
        "attentions": Qwen2Attention,
    }

    def __init__(self, config: ShrunkQwen2Config) -> None:
        super().__init__(_without_blocks(config))
        _take_shapes(self, config, ShrunkQwen2Block)


class ShrunkQwen2ForCausalLM(Qwen2ForCausalLM):
    """Qwen2 whose blocks have the shapes that its configuration gives."""

    config_class = ShrunkQwen2Config
    _no_split_modules = ["ShrunkQwen2Block"]  # noqa: RUF012 - as Transformers has it

    def __init__(self, config: ShrunkQwen2Config) -> None:
        super(Qwen2ForCausalLM, self).__init__(config)
        _take_body(self, ShrunkQwen2Model(config), config)


def register_models() -> None:
    """Let Transformers' automatic classes know the models; doing it twice is allowed."""
    register_configs()
    AutoModelForCausalLM.register(ShrunkLlamaConfig, ShrunkLlamaForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(ShrunkQwen2Config, ShrunkQwen2ForCausalLM, exist_ok=True)


def _without_blocks(config: Config) -> Config:
    """Return a copy whose model builds no block of the dense size, only to drop it again."""
    own = copy.copy(config)
    own.num_hidden_layers = 0
    return own


def _take_shapes(
    model: LlamaModel | Qwen2Model,
    config: ShrunkLlamaConfig | ShrunkQwen2Config,
    kind: type[ShrunkBlock],
) -> None:
    model.config = config
    blocks: list[nn.Module] = []
    attentions = 0
    for shape, pairs in zip(shapes_of(config), pairs_of(config), strict=True):
        blocks.append(kind(config, shape, pairs, attentions))
        attentions += shape.has_attention
    model.layers = nn.ModuleList(blocks)
    model.post_init()  # type: ignore[no-untyped-call]


def _hold_lines(
    attention: nn.Module, shape: BlockShape, pairs: tuple[tuple[int, ...], ...] | None
) -> None:
    """Replace the matrices of a dense attention that hold fewer lines than its heads have."""
    size = attention.head_dim
    assert isinstance(size, int)
    lines = held_lines(shape, pairs, size)
    for name, own in lines.items():
        path = f"{name[0]}_proj"  # q, k, v, o
        dense = attention.get_submodule(path)
        assert isinstance(dense, nn.Linear)
        bias = dense.bias is not None
        if name == "output" and len(own) < dense.in_features:
            held: nn.Module = HeldColumns(
                len(own), dense.out_features, bias, lines=own, num_lines=dense.in_features
            )
        elif name != "output" and len(own) < dense.out_features:
            held = HeldRows(
                dense.in_features, len(own), bias, lines=own, num_lines=dense.out_features
            )
        else:
            continue
        setattr(attention, path, held)


def _take_body(
    model: LlamaForCausalLM | Qwen2ForCausalLM,
    body: LlamaModel | Qwen2Model,
    config: PreTrainedConfig,
) -> None:
    model.model = body
    model.vocab_size = config.vocab_size
    model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    model.post_init()  # type: ignore[no-untyped-call]
