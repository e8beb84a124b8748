"""Tiny random models of many families, with a byte-level tokenizer, in Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from unicuco.models import profile_model, quiet_transformers
from unicuco.types import ModelProfile

END_OF_TEXT: Final = "<|endoftext|>"
VOCABULARY: Final = 260


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    context: int
    tied: bool
    std: float

    def llama_like(self) -> dict[str, Any]:  # Any: keywords of many config classes
        return {
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.context,
            "initializer_range": self.std,
            "tie_word_embeddings": self.tied,
            **_ENDS,
        }


_ENDS: Final[dict[str, Any]] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


def tiny_model_folder(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    num_blocks: int = 2,
    hidden_size: int = 16,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    context: int = 64,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "50GB",
) -> Path:
    """Write a random model of one family with its tokenizer.

    Weights are drawn wide (standard deviation 1 / sqrt(hidden)), biases too, so that predictions
    differ from token to token and pruning shows.

    Args:
        folder: made if missing.
        family: one of `FAMILIES`.
        seed: decides every weight.
        num_blocks: transformer blocks.
        hidden_size: a multiple of ``num_heads``.
        num_heads: query heads.
        num_kv_heads: key and value heads, where the family groups queries.
        context: longest context.
        tied: whether embedding and head share their weights; GPT-2, GPT-Neo and OPT follow it too.
        dtype: of the weights in the file.
        max_shard_size: as in `save_pretrained`; small values write several shards and an index.

    Returns:
        ``folder``.

    Raises:
        ValueError: an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    size = _Size(
        blocks=num_blocks,
        hidden=hidden_size,
        heads=num_heads,
        kv_heads=num_kv_heads,
        context=context,
        tied=tied,
        std=hidden_size**-0.5,
    )
    model = _build(FAMILIES[family](size), seed, size.std)
    torch.nn.Module.to(model, dtype)  # transformers' own `to` is typed for a device only
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer(context).save_pretrained(folder)
    return folder


def build_tiny(family: str = "llama", *, seed: int = 0) -> tuple[PreTrainedModel, ModelProfile]:
    """Return a random model of one family of `FAMILIES` with its profile; 2 blocks, hidden 16."""
    size = _Size(blocks=2, hidden=16, heads=4, kv_heads=2, context=64, tied=False, std=0.25)
    model = _build(FAMILIES[family](size), seed, size.std)
    model.eval().requires_grad_(False)
    return model, profile_model(model, digest="0" * 64)


def tiny_tokenizer(context: int = 64) -> PreTrainedTokenizerFast:
    """Return a tokenizer of 257 tokens: end of text (0), then every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        END_OF_TEXT: 0,
        **{letter: index for index, letter in enumerate(alphabet, start=1)},
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _build(config: PreTrainedConfig, seed: int, std: float) -> PreTrainedModel:
    # Any: from_config is untyped.
    auto: Any = (
        AutoModelForImageTextToText if isinstance(config, LlavaConfig) else AutoModelForCausalLM
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the library's initialiser takes no generator
        model: PreTrainedModel = auto.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=std)
    return model


def _gpt2(size: _Size) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=size.hidden,
        n_layer=size.blocks,
        n_head=size.heads,
        n_positions=size.context,
        initializer_range=size.std,
        tie_word_embeddings=size.tied,
        **_ENDS,
    )


def _gpt_neo(size: _Size) -> PreTrainedConfig:
    half, odd = divmod(size.blocks, 2)
    kinds = [[["global", "local"], half]] if half else []
    return GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        num_layers=size.blocks,
        num_heads=size.heads,
        attention_types=[*kinds, [["global"], 1]] if odd else kinds,
        max_position_embeddings=size.context,
        window_size=size.context // 2,
        initializer_range=size.std,
        tie_word_embeddings=size.tied,
        **_ENDS,
    )


def _gpt_neox(size: _Size) -> PreTrainedConfig:
    fields = size.llama_like()
    del fields["num_key_value_heads"]
    return GPTNeoXConfig(**fields)


def _opt(size: _Size) -> PreTrainedConfig:
    return OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        ffn_dim=2 * size.hidden,
        word_embed_proj_dim=size.hidden,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        max_position_embeddings=size.context,
        init_std=size.std,
        tie_word_embeddings=size.tied,
        **{**_ENDS, "pad_token_id": 0},
    )


def _llava(size: _Size) -> PreTrainedConfig:
    return llava_around(LlamaConfig(**size.llama_like()))


def llava_around(text: PreTrainedConfig) -> LlavaConfig:
    """Return the configuration of a LLaVA-style model: a language model and a tiny vision tower."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=text.vocab_size - 1,
        tie_word_embeddings=text.tie_word_embeddings,
    )


FAMILIES: Final[dict[str, Callable[[_Size], PreTrainedConfig]]] = {
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "llama": lambda size: LlamaConfig(**size.llama_like()),
    "llava": _llava,
    "mistral": lambda size: MistralConfig(**size.llama_like()),
    "opt": _opt,
    "qwen2": lambda size: Qwen2Config(**size.llama_like()),
}
