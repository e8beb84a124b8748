"""A model in this process as lm-eval sees one: log likelihoods of given continuations.

lm-eval's own wrapper of Hugging Face models needs packages for accelerators and adapters; scoring
multiple choices needs none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import LM  # type: ignore[import-untyped]
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH = 16


class LocalModel(LM):  # type: ignore[misc]  # the base class is untyped
    """Scores continuations with a model as it is now.

    Args:
        model: causal, in eval mode.
        tokenizer: its own.
        context: tokens at most; longer texts lose their beginning.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int
    ) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._context = context

    # Any: lm-eval's requests; ``args`` are a text and its continuation
    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return, per request, the continuation's log likelihood and whether it is the greedy one.

        Requests are run in order of length, so that little is padded.
        """
        pairs = [self._encode(*request.args) for request in requests]
        order = sorted(range(len(pairs)), key=lambda k: len(pairs[k][0]))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            results = self._score([pairs[k] for k in chosen])
            found |= dict(zip(chosen, results, strict=True))
        return [found[k] for k in range(len(pairs))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Refuse: a text has no choices."""
        raise _refusal(requests, "the likelihood of whole texts")

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Refuse: what is generated is no choice."""
        raise _refusal(requests, "generated text")

    def _encode(self, text: str, continuation: str) -> tuple[list[int], int]:
        """Return the tokens of both together, and how many of them are the continuation's."""
        whole, first = (
            self._tokenizer.encode(part, add_special_tokens=False, verbose=False)
            for part in (text + continuation, text)
        )
        count = max(1, len(whole) - len(first))
        return whole[-self._context :], min(count, self._context - 1)

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        width = max(len(ids) for ids, _ in pairs)
        batch = torch.zeros(len(pairs), width, dtype=torch.int64)  # a causal model ignores the rest
        for row, (ids, _) in zip(batch, pairs, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        logits = self._model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
        return [
            _continuation(logits[k, : len(ids) - 1][-count:], torch.tensor(ids[-count:]))
            for k, (ids, count) in enumerate(pairs)
        ]


# Any: as `LocalModel.loglikelihood`
def _refusal(requests: Sequence[Any], wanted: str) -> SystemExit:
    names = {str(getattr(request, "task_name", None) or "given") for request in requests}
    return SystemExit(
        f"the task {', '.join(sorted(names))} asks for {wanted}; here continuations are scored by "
        "log likelihood only: give a task with output_type multiple_choice"
    )


def _continuation(log_p: Tensor, tokens: Tensor) -> tuple[float, bool]:
    likelihood = float(log_p.gather(1, tokens[:, None]).double().sum())
    return likelihood, bool((log_p.argmax(1) == tokens).all())
