"""vLLM's model of shrunk Llama- and Qwen2-shaped folders: blocks of different shapes.

Everything but the block is vLLM's Llama: its attention (Qwen2's differs in nothing but the biases
of queries, keys and values), MLP, norms, heads, weight loading and compilation. Keys and values are
cached for the attentions that exist. Imported by vLLM's registry alone, when such a model is
served.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.utils import extract_layer_index

from unicuco.models.shrunk_config import shapes_of


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
            self.self_attn = LlamaAttention(
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


# vLLM is not followed by the type check, so its classes are Any there.
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
