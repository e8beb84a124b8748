"""Find blocks and sites in a causal language model by structure, not by family names.

The blocks are the `ModuleList` whose entries all run when the model is given tokens alone (in
LLaVA the vision tower then stays still). The sites are the `Linear` and `Conv1D` matrices inside
them. That the model is causal is checked by what it does: changing the last token changes no
earlier prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unicuco.errors import ModelError
from unicuco.models.kv_cache import cached_heads
from unicuco.models.parts import find_parts
from unicuco.types import ModelProfile, Site

_PROBE_TOKENS: Final = 8
# Models without position embeddings (state-space, ALiBi) state no limit.
_UNSTATED_CONTEXT: Final = 2048
_LOOKED_FOR: Final = (
    "looked for a causal decoder: one ModuleList of blocks that all run on tokens alone, with "
    "Linear or Conv1D matrices inside"
)


def profile_model(model: PreTrainedModel, *, digest: str) -> ModelProfile:
    """Find the blocks and sites of a model and count its parameters.

    Runs four forward passes of at most 8 tokens.

    Args:
        model: with real weights, in eval mode.
        digest: sha256 of its weight files.

    Raises:
        ModelError: the model is an encoder or of an unknown shape; the line says what was looked
            for.
    """
    name = type(model).__name__
    vocabulary_size = _declared_vocabulary(model)
    first, second = probe_tokens(vocabulary_size, _max_context(model))
    ran, logits = _run(model, first)
    check_causal(model, logits, _run(model, second)[1])
    path = _block_list(model, ran)
    blocks = list(cast(nn.ModuleList, model.get_submodule(path)))
    outside = _outside_weights(model, path)
    sites = _find_sites(path, blocks, outside)
    _check_all_ran(name, sites, ran)
    params, num_bytes = _count_blocks(name, blocks, sites, outside)
    block_paths = tuple(f"{path}.{index}" for index in range(len(blocks)))
    unique = _unique(model.parameters())
    return ModelProfile(
        digest=digest,
        architecture=name,
        sites=sites,
        block_paths=block_paths,
        block_params=params,
        block_bytes=num_bytes,
        total_params=sum(p.numel() for p in unique),
        total_bytes=sum(p.numel() * p.element_size() for p in unique),
        vocabulary_size=int(logits.shape[-1]),
        max_context=_max_context(model),
        parts=find_parts(model, block_paths, sites, lambda: _run(model, first)),
        kv_heads=cached_heads(model, first, len(blocks)),
    )


def _declared_vocabulary(model: PreTrainedModel) -> int:
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int) or size < 2:
        raise ModelError(f"{type(model).__name__} states no vocabulary; {_LOOKED_FOR}")
    return size


def _max_context(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    for field in ("max_position_embeddings", "max_seq_len", "seq_length"):
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return _UNSTATED_CONTEXT


def probe_tokens(vocabulary_size: int, max_context: int) -> tuple[Tensor, Tensor]:
    """Return two windows, ``1 x t`` of at most 8 tokens, that differ in their last token alone."""
    num_tokens = min(_PROBE_TOKENS, max_context)
    # Spread over the vocabulary, and away from its ends, where special tokens (images, padding)
    # live.
    steps = torch.arange(1, num_tokens + 1)
    first = (steps * vocabulary_size) // (num_tokens + 2)
    second = first.clone()
    second[-1] = (int(first[-1]) + vocabulary_size // 2 + 1) % vocabulary_size
    if int(second[-1]) == int(first[-1]):
        second[-1] = (int(first[-1]) + 1) % vocabulary_size
    return first[None], second[None]


@torch.no_grad()
def _run(model: PreTrainedModel, ids: Tensor) -> tuple[set[str], Tensor]:
    ran: set[str] = set()
    with ExitStack() as hooks:
        for name, module in model.named_modules(remove_duplicate=False):
            handle = module.register_forward_pre_hook(lambda _m, _a, name=name: ran.add(name))
            hooks.callback(handle.remove)
        try:
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        # Any family may fail in its own way when it is given tokens alone.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ModelError(
                f"{type(model).__name__} can't run on tokens alone "
                f"({type(error).__name__}: {reason}); {_LOOKED_FOR}"
            ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] != ids.shape[1]:
        raise ModelError(
            f"{type(model).__name__} does not predict a token at every position; {_LOOKED_FOR}"
        )
    return ran, logits[0].float()


def check_causal(model: PreTrainedModel, first: Tensor, second: Tensor) -> None:
    """Refuse a model that predicted ``t x v`` otherwise before the token that two probes differ in.

    Raises:
        ModelError: it is no causal one, or predicts NaN.
    """
    if not bool(torch.isfinite(first).all() & torch.isfinite(second).all()):
        raise ModelError(
            f"{type(model).__name__} predicts NaN or infinity; its weights or its dtype are broken"
        )
    # Equal shapes run equal kernels, so a causal model repeats itself to the bit; the slack is for
    # accelerators.
    slack = 1e-5 * max(1.0, float(first.abs().max()))
    if float((first[:-1] - second[:-1]).abs().max()) > slack:
        raise ModelError(
            f"{type(model).__name__} is not causal: changing the last token changes earlier "
            f"predictions (an encoder such as BERT?); {_LOOKED_FOR}"
        )


def _block_list(model: PreTrainedModel, ran: set[str]) -> str:
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if all(
            f"{name}.{index}" in ran and _holds_matrix(entry) for index, entry in enumerate(module)
        ):
            found.append(name)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has an unknown shape: no such list of blocks; {_LOOKED_FOR}"
        )
    if len(found) > 1:
        raise ModelError(
            f"{type(model).__name__} has an unknown shape: {len(found)} such lists "
            f"({', '.join(found)}); {_LOOKED_FOR}"
        )
    return found[0]


def _find_sites(path: str, blocks: list[nn.Module], outside: set[int]) -> tuple[Site, ...]:
    # A matrix that an earlier site or the embedding holds too is counted there, once.
    seen = set(outside)
    sites: list[Site] = []
    for block, module in enumerate(blocks):
        for name, matrix in _matrices(module):
            if id(matrix.weight) in seen:
                continue
            seen.add(id(matrix.weight))
            rows, columns = cast(Tensor, matrix.weight).shape
            transposed = isinstance(matrix, Conv1D)
            if transposed:
                rows, columns = columns, rows
            site_path = f"{path}.{block}.{name}" if name else f"{path}.{block}"
            sites.append(
                Site(
                    block=block,
                    path=site_path,
                    num_rows=rows,
                    num_columns=columns,
                    transposed=transposed,
                )
            )
    return tuple(sites)


def _check_all_ran(name: str, sites: tuple[Site, ...], ran: set[str]) -> None:
    # What no token reaches (one expert of many, attention to an encoder) can't be judged by text.
    idle = [site.path for site in sites if site.path not in ran]
    if idle:
        raise ModelError(
            f"{name} has an unknown shape: {len(idle)} matrices in its blocks, e.g. {idle[0]}, do "
            f"not run on tokens alone; {_LOOKED_FOR}"
        )


def _count_blocks(
    name: str, blocks: list[nn.Module], sites: tuple[Site, ...], outside: set[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    seen = set(outside)
    params: list[int] = []
    num_bytes: list[int] = []
    for block, module in enumerate(blocks):
        own = [p for p in _unique(module.parameters()) if id(p) not in seen]
        seen.update(id(p) for p in own)
        params.append(sum(p.numel() for p in own))
        num_bytes.append(sum(p.numel() * p.element_size() for p in own))
        in_sites = sum(site.num_weights for site in sites if site.block == block)
        if in_sites == 0:
            raise ModelError(
                f"{name} has an unknown shape: block {block} has no matrix of its own; "
                f"{_LOOKED_FOR}"
            )
        if 2 * in_sites < params[-1]:
            raise ModelError(
                f"{name} has an unknown shape: only {in_sites:,} of the {params[-1]:,} parameters "
                f"of block {block} are in matrices that can be pruned (fused experts?); "
                f"{_LOOKED_FOR}"
            )
    return tuple(params), tuple(num_bytes)


def _outside_weights(model: nn.Module, path: str) -> set[int]:
    prefix = f"{path}."
    named = model.named_parameters(remove_duplicate=False)
    return {id(parameter) for name, parameter in named if not name.startswith(prefix)}


def _holds_matrix(module: nn.Module) -> bool:
    return any(True for _ in _matrices(module))


def _matrices(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | Conv1D) and min(part.weight.shape) > 0:
            yield name, part


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())
