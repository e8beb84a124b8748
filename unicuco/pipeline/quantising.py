"""Finds the coarsest 8-bit steps that a limit of KL allows, on validation text.

The KL grows about with the square of the step, so a few trials along that line suffice. What it
does not know: containers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unicuco.errors import InfeasibleRequestError
from unicuco.models import load_model, load_tokenizer
from unicuco.objectives import DenseReference
from unicuco.packing import (
    Int8Matrix,
    QuantisedModel,
    StoredMatrix,
    drop_by_peaks,
    measure,
    quantise,
)
from unicuco.pipeline.options import ProgressSink
from unicuco.pipeline.texts import learning_texts, window_length
from unicuco.search.drive import Progress

_TRIALS: Final = 6
_NEAR: Final = 0.93  # of the limit: a step 3% coarser would be 0.05 bits per weight less


class Quantiser:
    """A model with what its calibration text says, quantised at any step.

    Args:
        folder: the model.
        calibration: UTF-8 text of which calibration and validation are cut; none: the reference
            corpus.
        tokens: of each.
        seed: draws the labels of the Fisher pass.
        progress: told of every window and trial.

    Raises:
        ModelError: the model can't be used, or not be quantised.
        TextError: the text can't be read or is too short.
    """

    def __init__(
        self,
        folder: Path,
        *,
        calibration: Path | None,
        tokens: int,
        seed: int,
        progress: ProgressSink = lambda step: None,
    ) -> None:
        progress(Progress(stage="load", done=0, total=1, detail=str(folder)))
        self.loaded = load_model(folder)
        context = window_length(self.loaded.profile.max_context, None)
        tokenizer = load_tokenizer(folder)
        texts = learning_texts(tokenizer, calibration, tokens=tokens, context=context)
        progress(Progress(stage="load", done=1, total=1))
        self.model = QuantisedModel(self.loaded)
        self.validation = Judge(self.loaded.model, texts.validation.ids)
        self.measured = measure(
            self.loaded,
            texts.calibration,
            seed=seed,
            progress=lambda done, total: progress(
                Progress(stage="calibrate", done=done, total=total)
            ),
        )
        self._progress = progress

    def at(self, step: float, *, sparsity: float = 0.0) -> dict[str, Int8Matrix]:
        """Quantise at a step and leave the loaded model so.

        Args:
            step: as `Sensitivity.steps` takes it.
            sparsity: of the sites, dropped first; what is zero already stays so.

        Returns:
            Tensor name -> matrix, as its file stores it.
        """

        def change(matrix: StoredMatrix, weight: Tensor) -> Int8Matrix:
            drop = self.drop(matrix, weight, sparsity)
            sensitivity = self.measured.sensitivities[matrix.parameter]
            return quantise(weight, sensitivity, step, drop=drop)

        return self.model.apply(change)

    def drop(self, matrix: StoredMatrix, weight: Tensor, sparsity: float) -> Tensor:
        """Return what of a matrix is zero or goes, ``o x i`` bool; of embeddings nothing goes."""
        drop = weight == 0
        peaks = self.measured.peaks.get(matrix.parameter)
        if sparsity and peaks is not None:
            drop |= drop_by_peaks(weight, peaks, sparsity)
        return drop

    def step_for(self, kl: float) -> float:
        """Return the step whose KL is ``kl`` nats per token, to second order."""
        return math.sqrt(24 * kl / self.num_weights)

    def within(
        self, max_kl: float, *, sparsity: float = 0.0
    ) -> tuple[dict[str, Int8Matrix], float]:
        """Quantise as coarsely as a KL on validation text allows, and leave the loaded model so.

        Args:
            max_kl: nats per token, > 0.
            sparsity: of the sites, dropped first.

        Returns:
            The matrices as `at` gives them, and their KL.

        Raises:
            InfeasibleRequestError: no step found meets it; says what was reached.
        """
        step = self.step_for(max_kl)
        best: tuple[float, dict[str, Int8Matrix], float] | None = None
        least = kl = math.inf
        for trial in range(_TRIALS):
            matrices = self.at(step, sparsity=sparsity)
            kl = self.validation.kl()
            detail = f"KL {kl:.4g}"
            self._progress(Progress(stage="quantise", done=trial + 1, total=_TRIALS, detail=detail))
            least = min(least, kl)
            if kl <= max_kl and (best is None or step > best[0]):
                best = (step, matrices, kl)
                if kl >= _NEAR * max_kl:
                    break
            # Aimed a little below the limit, so that the next trial is within it.
            step *= min(4.0, max(0.25, math.sqrt(0.97 * max_kl / max(kl, 1e-12))))
        if best is None:
            raise InfeasibleRequestError(
                f"8-bit weights{f' at sparsity {sparsity:g}' if sparsity else ''} do not get below "
                f"a KL of {least:.4g} on validation text; ask for that or more",
                nearest=least,
            )
        if kl != best[2]:
            self.at(best[0], sparsity=sparsity)
        return best[1], best[2]

    @property
    def num_weights(self) -> int:
        """Weights in all quantised matrices."""
        return sum(math.prod(m.entry.shape) for m in self.model.matrices.values())


class Judge:
    """KL to the model as it is at construction, on one text.

    Args:
        model: whose weights change from one measurement to the next.
        ids: ``n x context`` tokens.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self._model = model
        self._ids = ids
        with torch.no_grad():
            self._dense = [DenseReference.from_logits(self._logits(window)) for window in ids]

    @torch.no_grad()
    def kl(self) -> float:
        """Return the KL of the model as it is now, nats per token."""
        pairs = zip(self._dense, self._ids, strict=True)
        total = sum(float(d.kl(self._logits(w)).double().sum()) for d, w in pairs)
        return max(0.0, total / self._ids.numel())

    def _logits(self, window: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=window[None], use_cache=False).logits[0]
        return logits
