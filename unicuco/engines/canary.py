"""What a model must say to the canary prompt, found without the engine that is to be checked.

A plain greedy loop over transformers' float32 logits. Two correct engines may choose differently
where the best two tokens are nearly equal, so the expectation ends before the first such place.
What this module does not know: engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from unicuco.engines.streaming import CANARY_PROMPT, CANARY_TOKENS
from unicuco.models import load_model, load_tokenizer

# Logits in nats: float32 engines differ by some 1e-5, bfloat16 ones by some 1e-2.
_CLEAR_GAP: Final = 0.05


def canary_prompt(folder: Path) -> tuple[int, ...]:
    """Return the canary prompt in the folder's own tokens.

    Raises:
        ModelError: it holds no tokenizer that can be read.
    """
    return tuple(load_tokenizer(folder)(CANARY_PROMPT)["input_ids"])


def expected_tokens(folder: Path, prompt: Sequence[int]) -> tuple[int, ...]:
    """Return the greedy tokens that every engine of this folder must begin with; may be none.

    Args:
        folder: a model or variant.
        prompt: token ids.

    Raises:
        ModelError: no usable model is there.
    """
    model = load_model(folder).model
    ids = list(prompt)
    gaps: list[float] = []
    while len(gaps) < CANARY_TOKENS:
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        ids.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        if ids[-1] == model.config.eos_token_id:
            break
    return confident_prefix(ids[len(prompt) :], gaps)


def confident_prefix(tokens: Sequence[int], gaps: Sequence[float]) -> tuple[int, ...]:
    """Return the tokens before the first whose lead over the runner-up is too small to tell.

    Args:
        tokens: ``t`` token ids.
        gaps: ``t`` leads, in nats, >= 0.
    """
    unsure = next((place for place, gap in enumerate(gaps) if gap < _CLEAR_GAP), len(gaps))
    return tuple(tokens[:unsure])
