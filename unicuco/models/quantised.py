"""Reads a model of fewer bits, as `unicuco.export.quantised` writes it, without any other package.

Matrices come back as the floats that their codes stand for, and what has 8 bits rounds its inputs
per token, as engines do. What this module does not know: other forms of compressed-tensors, which
are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from torch import Tensor, nn

from unicuco.bits import IntegerMatrix, round_inputs, unpack_words
from unicuco.errors import ModelError

_KNOWN: Final = {"int-quantized": 8, "pack-quantized": 4}
_SCALE: Final = ".weight_scale"


def check_known(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a ``quantization_config`` of other forms than ours.

    Raises:
        ModelError: says what it is.
    """
    known = config.get("quant_method") == "compressed-tensors" and all(
        _KNOWN.get(group.get("format")) == (group.get("weights") or {}).get("num_bits")
        for group in config.get("config_groups", {}).values()
    )
    if not known:
        raise ModelError(
            f"{folder} is already quantised; give the model with its full-precision weights"
        )


def read_state(files: Sequence[Path]) -> dict[str, Tensor]:
    """Return all tensors of some files by name, those of fewer bits as float32 weights."""
    state: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in names:
                front = name.removesuffix(_SCALE)
                if name.endswith(_SCALE):
                    scales = file.get_tensor(name)
                    if f"{front}.weight" in names:
                        codes = file.get_tensor(f"{front}.weight")
                    else:
                        columns = int(file.get_tensor(f"{front}.weight_shape")[1])
                        codes = unpack_words(file.get_tensor(f"{front}.weight_packed"), columns)
                    state[f"{front}.weight"] = IntegerMatrix(codes, scales).dequantise()
                elif not name.endswith((".weight_packed", ".weight_shape")):
                    state.setdefault(name, file.get_tensor(name))
    return state


def round_eight_bit_inputs(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Make the modules that a ``quantization_config`` gives 8 bits round what they are given."""
    modules = dict(model.named_modules())
    for group in config["config_groups"].values():
        if group["input_activations"]:
            for target in group["targets"]:
                round_inputs(modules[target])
