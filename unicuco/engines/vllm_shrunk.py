"""vLLM's model of shrunk Llama- and Qwen2-shaped folders: blocks of different shapes.

Everything but the block is vLLM's Llama: its attention (Qwen2's differs in nothing but the biases
of queries, keys and values), MLP, norms, heads, weight loading and compilation. Keys and values are
cached for the attentions that exist. Where matrices hold fewer coordinates than heads have, those
are spread over whole heads between the matrices and vLLM's kernels, so the cache holds whole heads.
Imported by vLLM's registry alone, when such a model is served.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.utils import extract_layer_index

from unicuco.models.block_shapes import held_lines
from unicuco.models.shrunk_config import pairs_of, shapes_of


# vLLM is not followed by the type check, so its classes are Any there.
class NarrowAttention(LlamaAttention):  # type: ignore[misc]
    """vLLM's attention between matrices that hold some coordinates of every head."""

    # Any: vLLM's own arguments travel through.
    def __init__(self, *, config: Any, prefix: str, **own: Any) -> None:
        super().__init__(config=config, prefix=prefix, **own)
        block = extract_layer_index(prefix)
        shape, pairs = shapes_of(config)[block], pairs_of(config)[block]
        self._held = shape.query_key_size or self.head_dim, shape.value_size or self.head_dim
        self.qkv_proj = QKVParallelLinear(
            hidden_size=self.hidden_size,
            head_size=self._held[0],
            total_num_heads=self.total_num_heads,
            total_num_kv_heads=self.total_num_kv_heads,
            bias=own["bias"],
            quant_config=own["quant_config"],
            prefix=f"{prefix}.qkv_proj",
            v_head_size=self._held[1],
        )
        self.o_proj = RowParallelLinear(
            input_size=self.total_num_heads * self._held[1],
            output_size=self.hidden_size,
            bias=own["bias_o_proj"],
            quant_config=own["quant_config"],
            prefix=f"{prefix}.o_proj",
        )
        self._spread_pairs = pairs is not None
        if pairs is not None:
            first = self.total_num_kv_heads * get_tensor_model_parallel_rank()
            first //= get_tensor_model_parallel_world_size()
            mine = replace(shape, attention_heads=self.num_heads, key_value_heads=self.num_kv_heads)
            lines = held_lines(mine, pairs[first : first + self.num_kv_heads], self.head_dim)
            for name in ("query", "key"):
                self.register_buffer(f"{name}_lines", torch.tensor(lines[name]), persistent=False)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what attention adds to the stream."""
        held, ranks = self._held
        sizes = [self.num_heads * held, self.num_kv_heads * held, self.num_kv_heads * ranks]
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(sizes, dim=-1)
        if self._spread_pairs:
            q = q.new_zeros(q.shape[0], self.q_size).index_copy(-1, self.query_lines, q)
            k = k.new_zeros(k.shape[0], self.kv_size).index_copy(-1, self.key_lines, k)
        missing = self.head_dim - ranks
        v = pad(v.reshape(-1, self.num_kv_heads, ranks), (0, missing)).flatten(1)
        q, k = self.rotary_emb(positions, q, k)
        attended = self.attn(q, k, v).view(-1, self.num_heads, self.head_dim)
        output: torch.Tensor = self.o_proj(attended[..., :ranks].flatten(1))[0]
        return output


class ShrunkBlock(nn.Module):
    """A block in which attention or MLP, with its norm, may be missing.

    ``vllm_config`` is ``Any``: vLLM's types would pull the whole library into every type check.
    """

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self._shape = shapes_of(config)[extract_layer_index(prefix)]
        if self._shape.has_attention:
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            narrow = self._shape.query_key_size or self._shape.value_size
            self.self_attn = (NarrowAttention if narrow else LlamaAttention)(
                config=config,
                hidden_size=config.hidden_size,
                num_heads=self._shape.attention_heads,
                num_kv_heads=self._shape.key_value_heads,
                max_position_embeddings=config.max_position_embeddings,
                quant_config=vllm_config.quant_config,
                bias=config.qkv_bias,
                bias_o_proj=getattr(config, "attention_bias", False),
                cache_config=vllm_config.cache_config,
                prefix=f"{prefix}.self_attn",
            )
        if self._shape.has_mlp:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=self._shape.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=vllm_config.quant_config,
                bias=getattr(config, "mlp_bias", False),
                prefix=f"{prefix}.mlp",
            )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what is to be added to the stream next, and the stream, as vLLM's blocks do."""
        if self._shape.has_attention:
            hidden_states, residual = _normed(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self._shape.has_mlp:
            hidden_states, residual = _normed(
                self.post_attention_layernorm, hidden_states, residual
            )
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


class ShrunkForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """vLLM's Llama of such blocks."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=ShrunkBlock)


def _normed(
    norm: nn.Module, hidden_states: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add what is pending to the stream, and return its norm and the stream."""
    if residual is None:
        return norm(hidden_states), hidden_states
    normed, stream = norm(hidden_states, residual)
    return normed, stream
