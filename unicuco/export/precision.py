"""What fewer bits are called: in ``config.json``, and in ``strategy.json`` what runs where.

The forms are compressed-tensors': ``int-quantized`` (8-bit weights, inputs rounded per token) and
``pack-quantized`` (4-bit groups, inputs as they are), together ``mixed-precision``. What runs them
was read in vLLM 0.32 and tried on a CPU: 8 bits everywhere (oneDNN's int8 product, in float32 or
bfloat16), 4 bits where rows and columns are multiples of 32 and the group is even, in bfloat16
alone. Matrices that an engine fuses must have the same bits; the axes of weight_bits see to it.
Keys and values: vLLM has one flag for the whole model, and of our bits only fp8 comes near on a
CPU; so blocks are judged with theirs, and the engine gets fp8 where they are nearer to it than to
16 bits on the average.

What it does not know: tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from unicuco.bits import group_size
from unicuco.types import Site

_CPU_MULTIPLE: Final = 32  # of rows and columns, for vLLM's 4-bit product on a CPU
_NEAREST_FLAG_BITS: Final = 12  # between fp8 and 16 bits


def quantization_config(
    modules: Mapping[str, tuple[Site, int]], stored: Mapping[str, object]
) -> dict[str, Any]:
    """Return the ``quantization_config`` of ``config.json``.

    Args:
        modules: name of every matrix' module in the files -> its site and bits.
        stored: the names of all tensors in the files.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    ignored = [name for name, (_, bits) in modules.items() if bits == 16]
    for name, (site, bits) in modules.items():
        if bits < 16:
            size = group_size(site.num_columns) if bits == 4 else site.num_columns
            whole = size == site.num_columns
            groups.setdefault((bits, 0 if whole else size), []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{k}": _group(bits, size, names)
            for k, ((bits, size), names) in enumerate(sorted(groups.items()))
        },
        "ignore": ["lm_head", *ignored],
        "kv_cache_scheme": None,
    }


# Any: JSON.
def _group(bits: int, size: int, names: Sequence[str]) -> dict[str, Any]:
    common = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    per_token = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
    return {
        "targets": list(names),
        "weights": {**common, **strategy},
        "input_activations": {**per_token, "strategy": "token"} if bits == 8 else None,
        "output_activations": None,
        "format": "int-quantized" if bits == 8 else "pack-quantized",
    }


def kv_flag(bits: Sequence[int]) -> str:
    """Return the engine's ``kv_cache_dtype`` nearest to the bits of all blocks: auto or fp8."""
    return "fp8" if bits and sum(bits) / len(bits) < _NEAREST_FLAG_BITS else "auto"


def describe(
    sites: Sequence[Site], weight_bits: Sequence[int], kv_bits: Sequence[int], judges_kv: bool
) -> dict[str, object]:
    """Return what ``strategy.json`` says under ``precision``.

    Args:
        sites: of the model.
        weight_bits: of every site.
        kv_bits: of what every block caches.
        judges_kv: whether they were a dimension.
    """
    odd = [
        site.path
        for site, bits in zip(sites, weight_bits, strict=True)
        if bits == 4 and (site.num_rows % _CPU_MULTIPLE or site.num_columns % _CPU_MULTIPLE)
    ]
    cpu = "yes, in bfloat16" if 4 in weight_bits else "yes"
    if odd:
        cpu = f"no: 4 bits need multiples of 32, {odd[0]} has others"
    document: dict[str, object] = {
        "weight_bits": {s.path: bits for s, bits in zip(sites, weight_bits, strict=True)},
        "runs_on": {
            "vllm_cpu": cpu,
            "transformers": "yes, with the package compressed-tensors",
        },
    }
    if judges_kv:
        document["kv_cache"] = {
            "judged_bits": list(kv_bits),
            "engine_flag": {"kv_cache_dtype": kv_flag(kv_bits)},
        }
    return document
