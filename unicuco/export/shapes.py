"""The ``config.json`` of a model that lost blocks, parts of blocks, or units of parts.

Where the blocks that are left are whole, any family's configuration says fewer blocks. Where they
are not, Llama and Qwen2 become a plain Llama or Qwen2 if all blocks are alike, and otherwise one
with a shape per block (`unicuco.models.block_shapes`). Refused, with what to do instead: other
families' parts, and configurations that describe blocks in ways not known here.

What this module does not know: tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from unicuco.errors import VariantError
from unicuco.models.block_shapes import SHRUNK_NAMES, BlockShape

_COUNTS: Final = ("num_hidden_layers", "n_layer", "num_layers")  # by family
_PER_BLOCK: Final = ("attention_types", "attention_layers", "text_config", "no_rope_layers")


def with_blocks(config: Mapping[str, Any], kept: Sequence[int], num_blocks: int) -> dict[str, Any]:
    """Return the configuration of a model with only some of its blocks, each as it is.

    Raises:
        VariantError: the configuration does not say plainly how many blocks there are.
    """
    counts = [name for name in _COUNTS if name in config]
    strange = [name for name in _PER_BLOCK if config.get(name)]
    if not counts or config[counts[0]] != num_blocks or strange:
        raise VariantError(
            f"a {config.get('model_type')} model's config.json describes its blocks in a way that "
            f"can't be cut ({', '.join(strange) or 'no number of blocks'}); ask for masks instead: "
            "learn with --dimensions sparsity"
        )
    new = {**config, counts[0]: len(kept)}
    if isinstance(config.get("layer_types"), list):
        new["layer_types"] = [config["layer_types"][block] for block in kept]
    return new


def with_shapes(
    config: Mapping[str, Any],
    architecture: str,
    kept: Sequence[int],
    shapes: Sequence[BlockShape],
    num_blocks: int,
) -> dict[str, Any]:
    """Return the configuration of a model whose kept blocks have these shapes.

    Raises:
        VariantError: of this family no such variant can be written.
    """
    if architecture not in SHRUNK_NAMES:
        raise VariantError(
            f"blocks of {architecture} can only be removed whole ({', '.join(SHRUNK_NAMES)} lose "
            "parts too); learn with --granularity block, or masks with --dimensions sparsity"
        )
    if config.get("use_sliding_window"):
        raise VariantError("a model with a sliding window can't be shrunk; ask for masks instead")
    heads = int(config["num_attention_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    new = {**with_blocks(config, kept, num_blocks), "head_dim": head_dim}
    if "layer_types" in new:
        new["layer_types"] = ["full_attention"] * len(kept)
    if _is_plain(architecture, int(config["hidden_size"]), heads, shapes):
        shape = shapes[0]
        sizes = {
            "intermediate_size": shape.intermediate_size,
            "num_attention_heads": shape.attention_heads,
            "num_key_value_heads": shape.key_value_heads,
        }
        return {**new, **sizes}
    model_type, name = SHRUNK_NAMES[architecture]
    named = {"model_type": model_type, "architectures": [name]}
    return {**new, **named, "block_shapes": [shape.to_dict() for shape in shapes]}


def _is_plain(
    architecture: str, hidden_size: int, heads: int, shapes: Sequence[BlockShape]
) -> bool:
    """Say whether the family's own configuration can describe these shapes."""
    first = shapes[0]
    if first.query_key_size or first.value_size:
        return False
    if len(set(shapes)) > 1 or not (first.has_attention and first.has_mlp):
        return False
    # Llama's refuses heads that don't divide the hidden size; Qwen2's engines know no head size.
    fits = hidden_size % first.attention_heads == 0 and architecture == "LlamaForCausalLM"
    return fits or first.attention_heads == heads
