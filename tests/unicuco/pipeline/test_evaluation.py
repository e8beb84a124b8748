from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from unicuco.errors import ModelError
from unicuco.objectives import DenseReference
from unicuco.pipeline import evaluate_variant


def test_a_kl_that_is_no_number_is_an_error_and_never_zero(
    tiny_llama: Path, tiny_text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_number(self: DenseReference, logits: Tensor) -> Tensor:
        return torch.full(logits.shape[:1], torch.nan)

    monkeypatch.setattr(DenseReference, "kl", no_number)
    with pytest.raises(ModelError, match="predicts NaN"):
        evaluate_variant(tiny_llama, reference=str(tiny_llama), text=tiny_text_file, tokens=64)
