"""The compressibility study: what schemes of quantisation cost in bits, coded and not, and in KL.

Every scheme is measured on the same matrices: the sites and the embeddings, scales counted, what
else the model has (norms, biases) left as it is. ``gaussian_bits`` is what the entropy of codes
would be if weights were normal, log2(σ√(2πe)) of codes with deviation σ (arXiv 2403.01384): where
it lies above the entropy, weights are heavier-tailed than that. KL is on test text; nothing is
chosen by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from unicuco.errors import RequestError
from unicuco.models import load_tokenizer, resolve_model
from unicuco.packing import (
    StoredMatrix,
    encode_tensor,
    entropy_bits,
    quantise,
    tensor_entropy_bits,
)
from unicuco.packing.layout import CHUNK_ITEMS
from unicuco.pipeline.options import ProgressSink
from unicuco.pipeline.quantising import Judge, Quantiser
from unicuco.pipeline.texts import test_windows, window_length
from unicuco.search.drive import Progress

_SCALE_BITS: Final = 16
_AWARE_KLS: Final = (0.003, 0.01, 0.03)  # what second-order theory promises for three steps


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsOptions:
    """What to study.

    ``groups``: weights that share a scale, each >= 1; ``sparsities``: of the sites, each in [0, 1);
    ``tokens`` of test text (and of calibration text); ``calibration`` and ``text``: UTF-8 files,
    none: the reference corpus.

    Raises:
        RequestError: a value outside its range.
    """

    model: str
    groups: tuple[int, ...] = (128, 32)
    sparsities: tuple[float, ...] = (0.0, 0.5)
    tokens: int = 4096
    calibration: Path | None = None
    text: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for group in self.groups:
            if group < 1:
                raise RequestError(f"a group must have at least 1 weight, got {group}")
        for sparsity in self.sparsities:
            if not 0 <= sparsity < 1:
                raise RequestError(f"sparsity must be in [0, 1), got {sparsity:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsRow:
    """One scheme at one sparsity, in bits per weight, scales counted; ``kl`` in nats per token.

    ``group``: weights per scale, or none; ``gaussian_bits`` none where there are no codes.
    """

    scheme: str
    group: int | None
    sparsity: float
    plain_bits: float
    entropy_bits: float
    coded_bits: float
    gaussian_bits: float | None
    kl: float


@dataclass(frozen=True, slots=True)
class _Codes:
    """A matrix' codes as bytes, the type they are coded as, their scales' bits, and the weights."""

    data: np.ndarray[tuple[int], np.dtype[np.uint8]]
    dtype: str
    plain_bits: float
    scale_bits: float
    weight: Tensor


_Scheme = Callable[[StoredMatrix, Tensor, Tensor], _Codes]


def study(
    options: BitsOptions, progress: ProgressSink = lambda step: None
) -> tuple[list[BitsRow], int]:
    """Measure every scheme at every sparsity.

    Returns:
        The rows, and how many tokens of test text KL was measured on.

    Raises:
        ModelError: the model can't be used.
        TextError: a text can't be read or is too short.
    """
    folder = resolve_model(options.model)
    quantiser = Quantiser(
        folder,
        calibration=options.calibration,
        tokens=options.tokens,
        seed=options.seed,
        progress=progress,
    )
    context = window_length(quantiser.loaded.profile.max_context, None)
    text = test_windows(
        load_tokenizer(folder), options.text, tokens=options.tokens, context=context
    )
    judge = Judge(quantiser.loaded.model, text.ids)
    schemes = list(_schemes(quantiser, options.groups))
    rows: list[BitsRow] = []
    total = len(schemes) * len(options.sparsities)
    for sparsity in options.sparsities:
        for name, group, scheme in schemes:
            rows.append(_measure(quantiser, judge, (name, group, sparsity), scheme))
            progress(Progress(stage="measure", done=len(rows), total=total, detail=name))
    return rows, text.num_tokens


def _schemes(
    quantiser: Quantiser, groups: Sequence[int]
) -> Iterator[tuple[str, int | None, _Scheme]]:
    yield "bf16", None, _stored
    yield "int8 tensor", None, _rounded(8, lambda weight: weight.numel())
    yield "int8 channel", None, _rounded(8, lambda weight: weight.shape[1])
    for bits in (8, 4):
        for group in groups:
            yield f"int{bits} group", group, _rounded(bits, _always(group))
    for kl in _AWARE_KLS:
        step = quantiser.step_for(kl)
        yield f"int8 aware {kl:g}", None, _aware(quantiser, step)


def _measure(
    quantiser: Quantiser, judge: Judge, key: tuple[str, int | None, float], scheme: _Scheme
) -> BitsRow:
    plain = entropy = coded = gaussian = 0.0
    name, group, sparsity = key

    def change(matrix: StoredMatrix, weight: Tensor) -> Tensor:
        nonlocal plain, entropy, coded, gaussian
        drop = quantiser.drop(matrix, weight, sparsity)
        codes = scheme(matrix, weight.masked_fill(drop, 0.0), drop)
        plain += codes.plain_bits
        entropy += codes.scale_bits + tensor_entropy_bits(codes.data, codes.dtype)
        coded += codes.scale_bits + _coded_bits(codes)
        if codes.dtype == "I8":
            sigma = float(codes.data.view(np.int8).astype(np.float64).std())
            gaussian += codes.scale_bits + codes.data.size * _gaussian(sigma)
        return codes.weight

    quantiser.model.set(change)
    weights = quantiser.num_weights
    return BitsRow(
        scheme=name,
        group=group,
        sparsity=sparsity,
        plain_bits=plain / weights,
        entropy_bits=entropy / weights,
        coded_bits=coded / weights,
        gaussian_bits=gaussian / weights if gaussian else None,
        kl=judge.kl(),
    )


def _gaussian(sigma: float) -> float:
    """Return the entropy of a normal variable rounded to integers, 0 where that is no density."""
    return max(0.0, math.log2(sigma * math.sqrt(2 * math.pi * math.e))) if sigma > 0 else 0.0


def _coded_bits(codes: _Codes) -> float:
    width = 1 if codes.dtype == "I8" else 2
    size = CHUNK_ITEMS * width
    parts = range(0, codes.data.size, size)
    return 8.0 * sum(len(encode_tensor(codes.data[at : at + size], codes.dtype)) for at in parts)


def _stored(matrix: StoredMatrix, weight: Tensor, drop: Tensor) -> _Codes:
    stored = weight.to(torch.bfloat16).contiguous()
    data = stored.view(torch.uint8).reshape(-1).numpy()
    return _Codes(data, "BF16", 16.0 * weight.numel(), 0.0, stored.float())


def _always(group: int) -> Callable[[Tensor], int]:
    return lambda weight: group


def _rounded(bits: int, group_of: Callable[[Tensor], int]) -> _Scheme:
    """Return symmetric round-to-nearest with one scale per group of consecutive weights."""
    limit = 2 ** (bits - 1) - 1

    def scheme(matrix: StoredMatrix, weight: Tensor, drop: Tensor) -> _Codes:
        size = group_of(weight)
        flat = weight.reshape(-1)
        padded = torch.zeros(-(-flat.numel() // size) * size)
        padded[: flat.numel()] = flat
        groups = padded.view(-1, size)
        scales = groups.abs().amax(1, keepdim=True) / limit
        scales = torch.where(scales > 0, scales, 1.0).to(torch.bfloat16).float()
        codes = (groups / scales).round().clamp(-limit - 1, limit)
        back = (codes * scales).view(-1)[: flat.numel()].view(weight.shape)
        data = codes.to(torch.int8).view(-1)[: flat.numel()].numpy().view(np.uint8)
        scale_bits = float(_SCALE_BITS * len(groups))
        return _Codes(data, "I8", bits * weight.numel() + scale_bits, scale_bits, back)

    return scheme


def _aware(quantiser: Quantiser, step: float) -> _Scheme:
    """Return compression-aware 8-bit weights at a step."""

    def scheme(matrix: StoredMatrix, weight: Tensor, drop: Tensor) -> _Codes:
        sensitivity = quantiser.measured.sensitivities[matrix.parameter]
        result = quantise(weight, sensitivity, step, drop=drop)
        exponents = np.concatenate([result.rows, result.columns]).view(np.uint8)
        data = result.codes.reshape(-1).view(np.uint8)
        scale_bits = entropy_bits(exponents) * exponents.size
        plain = 8.0 * (data.size + exponents.size)
        return _Codes(data, "I8", plain, scale_bits, result.dequantise())

    return scheme
