"""What vLLM's workers add for us: a sketch of the weights that they hold in memory now.

vLLM mixes `SketchingWorker` into its own worker class (``worker_extension_cls``). Each linear layer
is asked for its product with the fixed vector through the very kernel and the very packed weights
that answer callers; joined layers are taken apart under the names that Transformers uses. Layers
that are split over several GPUs or quantised are left out. Imported by vLLM alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from unicuco.engines.sketch import Sketch, folded, signs


class SketchingWorker:
    """Mixed into vLLM's worker."""

    model_runner: Any  # vLLM's

    @torch.inference_mode()
    def sketch_weights(self) -> dict[str, Any]:  # Any: JSON
        """Return the `Sketch` of the weights in memory, as plain values."""
        model = self.model_runner.get_model()
        joined = getattr(model, "packed_modules_mapping", None) or {}
        dtype = self.model_runner.model_config.dtype
        sums = {
            name: folded(outputs)
            for prefix, module in model.named_modules()
            for name, outputs in _outputs(prefix, module, joined, dtype)
        }
        return asdict(Sketch(torch.finfo(dtype).eps, sums))


def _outputs(
    prefix: str, module: nn.Module, joined: Mapping[str, Sequence[str]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what each tensor of one layer makes of the vector, under the tensor's own name."""
    if getattr(module, "tp_size", 1) > 1:
        return
    if isinstance(module, LinearBase):
        if not isinstance(module.quant_method, UnquantizedLinearMethod):
            return
        outputs = _product(module, module.input_size, dtype)
        names = _parts(prefix, joined)
        sizes = module.output_partition_sizes if len(names) > 1 else [len(outputs)]
        bias = () if module.bias is None else module.bias.split(sizes)
        yield from zip((f"{name}.weight" for name in names), outputs.split(sizes), strict=True)
        yield from zip((f"{name}.bias" for name in names), bias, strict=bool(bias))
        return
    for kind, tensor in module.named_parameters(recurse=False):
        if isinstance(module, ParallelLMHead) and tensor.ndim == 2:
            whole = _product(module, module.embedding_dim, dtype)
            yield f"{prefix}.{kind}", whole[: module.org_vocab_size]
        elif tensor.ndim == 2:
            rows = module.org_vocab_size if isinstance(module, VocabParallelEmbedding) else None
            yield f"{prefix}.{kind}", tensor[:rows] @ signs(tensor.shape[1], tensor)
        elif tensor.ndim == 1:
            yield f"{prefix}.{kind}", tensor


# vLLM is not followed by the type check, so its layers are Any there.
def _product(layer: Any, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the product with the vector by the layer's own kernel, without its bias."""
    device = next((tensor.device for tensor in layer.parameters()), torch.device("cpu"))
    inputs = signs(width, torch.empty(0, dtype=dtype, device=device))
    product = layer.quant_method.apply(layer, inputs[None])
    return product.view(-1)  # type: ignore[no-any-return]


def _parts(prefix: str, joined: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of what is joined in a layer, or its own."""
    before, _, last = prefix.rpartition(".")
    return [f"{before}.{part}" for part in joined.get(last, [last])]
