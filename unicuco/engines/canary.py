"""What an engine must say to the canary prompt and hold in memory, found without that engine.

A plain greedy loop over transformers' float32 logits. Two correct engines may choose differently
where the best two tokens are nearly equal, so the expectation ends before the first such place.
What this module does not know: engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from unicuco.engines.sketch import Sketch, sketch_of
from unicuco.engines.streaming import CANARY_PROMPT, CANARY_TOKENS
from unicuco.models import load_model, load_tokenizer

# Logits in nats: float32 engines differ by some 1e-5, bfloat16 ones by some 1e-2.
_CLEAR_GAP: Final = 0.05


@dataclass(frozen=True, slots=True)
class Expectation:
    """What every engine of one folder must show.

    ``tokens``: the greedy answer to the canary prompt must begin with them; may be none.
    ``weights``: of the model in memory.
    """

    tokens: tuple[int, ...]
    weights: Sketch


def canary_prompt(folder: Path) -> tuple[int, ...]:
    """Return the canary prompt in the folder's own tokens.

    Raises:
        ModelError: it holds no tokenizer that can be read.
    """
    return tuple(load_tokenizer(folder)(CANARY_PROMPT)["input_ids"])


def expectation_of(folder: Path, prompt: Sequence[int]) -> Expectation:
    """Return what Transformers makes of a folder.

    Args:
        folder: a model or variant.
        prompt: token ids.

    Raises:
        ModelError: no usable model is there.
    """
    model = load_model(folder, fewer_bits=True).model
    ids = list(prompt)
    gaps: list[float] = []
    while len(gaps) < CANARY_TOKENS:
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        ids.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        if ids[-1] == model.config.eos_token_id:
            break
    return Expectation(confident_prefix(ids[len(prompt) :], gaps), sketch_of(model))


def confident_prefix(tokens: Sequence[int], gaps: Sequence[float]) -> tuple[int, ...]:
    """Return the tokens before the first whose lead over the runner-up is too small to tell.

    Args:
        tokens: ``t`` token ids.
        gaps: ``t`` leads, in nats, >= 0.
    """
    unsure = next((place for place, gap in enumerate(gaps) if gap < _CLEAR_GAP), len(gaps))
    return tuple(tokens[:unsure])
