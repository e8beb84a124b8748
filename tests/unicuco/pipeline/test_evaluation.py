from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unicuco.errors import ModelError
from unicuco.objectives import DenseReference
from unicuco.pipeline import Run, evaluate_variant, predicting, prune
from unicuco.types import Request, Target


def test_a_kl_that_is_no_number_is_an_error_and_never_zero(
    tiny_llama: Path, tiny_text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_number(self: DenseReference, logits: Tensor) -> Tensor:
        return torch.full(logits.shape[:1], torch.nan)

    monkeypatch.setattr(DenseReference, "kl", no_number)
    with pytest.raises(ModelError, match="predicts NaN"):
        evaluate_variant(tiny_llama, reference=str(tiny_llama), text=tiny_text_file, tokens=64)


def test_what_memory_does_not_hold_is_measured_block_by_block_to_the_same_values(
    tiny_llama: Path,
    tiny_run: Path,
    tiny_text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variant = tmp_path / "variant"
    prune(Run.open(tiny_run), Request(target=Target.SPARSITY, value=0.5), variant)
    found = {}
    for free in (math.inf, 0.0):
        monkeypatch.setattr(predicting, "free_bytes", lambda free=free: free)
        found[free] = evaluate_variant(
            variant, reference=str(tiny_llama), text=tiny_text_file, tokens=320
        )
    whole, blockwise = found[math.inf], found[0.0]
    assert blockwise.kl == pytest.approx(whole.kl, rel=1e-5)
    assert blockwise.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    others = {"kl": None, "perplexity": 0.0}
    assert replace(blockwise, **others) == replace(whole, **others)
    assert whole.sparsity == pytest.approx(0.5, abs=1e-3)
