"""Where an evaluator computes, and in what.

On a CPU in float32. On a GPU in bfloat16, which its matrix units are made for: the weights as they
are cut, the hidden states and the gradients of matrices. What is summed over tokens or weights (the
KL, and what derivatives are made of) is float32 everywhere. Buffers (rotary frequencies) keep their
own precision.

What it does not know: which GPU. A process sees those that it was given.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from unicuco.evaluate.measure import EvaluatorConfig


def on_gpu(config: EvaluatorConfig) -> EvaluatorConfig:
    """Return the configuration of the same evaluator on this process' first GPU."""
    return replace(config, device="cuda", dtype="bfloat16")


def dtype_of(config: EvaluatorConfig) -> torch.dtype:
    """Return what weights are cut into and blocks compute in."""
    dtype = getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def move(model: PreTrainedModel, device: str, dtype: torch.dtype) -> None:
    """Bring a model's parameters and buffers to a device, the parameters also to a type."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    nn.Module.to(model, device)  # transformers' own `to` is typed wrongly
    model.tie_weights()  # not every device keeps shared parameters shared
