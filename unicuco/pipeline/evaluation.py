"""What a folder's model is worth on text nothing learned from: perplexity, KL, sparsity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch.nn.functional import cross_entropy

from unicuco.errors import ModelError, TextError
from unicuco.export.document import DOCUMENT_NAME, read_variant
from unicuco.models import load_tokenizer
from unicuco.models.folder import local_copy
from unicuco.objectives import DenseReference
from unicuco.pipeline.options import ProgressSink
from unicuco.pipeline.predicting import Predictor, open_predictors
from unicuco.pipeline.texts import test_windows, window_length
from unicuco.search.drive import Progress

DEFAULT_TOKENS: Final = (
    32_768  # half a minute for the reference model on two cores; a quarter of its test text
)

_LARGEST_LOSS: Final = 700.0  # exp(709.8) is the last finite float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """Measured on ``tokens`` tokens in windows of ``context``.

    ``kl`` is KL(dense‖variant) in nats per token, or none; ``sparsity`` is over the sites.
    """

    perplexity: float
    kl: float | None
    sparsity: float
    tokens: int
    context: int


def evaluate_variant(
    folder: Path | str,
    *,
    reference: str | None = None,
    text: Path | None = None,
    tokens: int | None = None,
    progress: ProgressSink = lambda step: None,
) -> EvaluationReport:
    """Measure a variant, or any model; block by block where memory does not hold it as a whole.

    Args:
        folder: a variant or model folder, or any name `resolve_model` takes.
        reference: the dense model to measure KL against; none: no KL.
        text: UTF-8 text; none: the reference corpus' test text.
        tokens: at most so many, evenly spread over the text; none: 32,768, or all of a shorter
            text.
        progress: told of every window, stage "measure".

    Raises:
        VariantError: a variant whose files are not those its ``strategy.json`` names.
        ModelError: no usable model, one that predicts NaN, or a reference with another vocabulary.
        TextError: the text can't be read or is too short.
    """
    folder = local_copy(folder)
    dense_name = None if reference is None else local_copy(reference)
    site_weights = 0
    if (Path(folder) / DOCUMENT_NAME).is_file():
        site_weights = read_variant(Path(folder)).site_weights
    model, *others = open_predictors(folder, *([] if dense_name is None else [dense_name]))
    dense = others[0] if others else None
    loaded = model.loaded
    if dense and dense.loaded.profile.vocabulary_size != loaded.profile.vocabulary_size:
        raise ModelError(
            f"{reference} has another vocabulary than {folder}: KL between them has no meaning"
        )
    context = window_length(loaded.profile.max_context, None)
    tokenizer = load_tokenizer(loaded.folder)
    windows = test_windows(tokenizer, text, tokens=None, context=context).ids
    if windows.numel() > (tokens or DEFAULT_TOKENS):
        windows = test_windows(
            tokenizer, text, tokens=tokens or DEFAULT_TOKENS, context=context
        ).ids
    if windows.shape[1] < 2:
        raise TextError("perplexity needs 2 tokens or more: give a longer text or more tokens")
    nll, kl = _run(model, dense, windows, progress)
    if math.isnan(nll) or (kl is not None and math.isnan(kl)):
        raise ModelError(f"{folder} predicts NaN on this text; its weights are broken")
    return EvaluationReport(
        perplexity=perplexity_of(nll),
        kl=kl,
        sparsity=model.sparsity(site_weights),
        tokens=windows.numel(),
        context=windows.shape[1],
    )


def perplexity_of(loss: float) -> float:
    """Return the perplexity of a mean loss in nats per token; infinite where floats end."""
    return math.exp(loss) if loss < _LARGEST_LOSS else math.inf


@torch.no_grad()
def _run(
    model: Predictor,
    dense: Predictor | None,
    windows: torch.Tensor,
    progress: ProgressSink,
) -> tuple[float, float | None]:
    """Return mean negative log likelihood of next tokens and mean KL of all positions, in nats."""
    nll, kl, done = 0.0, 0.0, 0
    references = None if dense is None else dense.logits(windows)
    progress(Progress(stage="measure", done=0, total=len(windows)))
    for logits in model.logits(windows):
        window = windows[done : done + len(logits)]
        done += len(window)
        nll += float(
            cross_entropy(logits[:, :-1].flatten(0, 1), window[:, 1:].flatten(), reduction="sum")
        )
        if references is not None:
            p = DenseReference.from_logits(next(references).flatten(0, 1))
            kl += float(p.kl(logits.flatten(0, 1)).double().sum())
        progress(Progress(stage="measure", done=done, total=len(windows)))
    predicted = windows.numel() - len(windows)
    return nll / predicted, None if dense is None else max(kl / windows.numel(), 0.0)
