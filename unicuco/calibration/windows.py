"""From text to token windows, and from windows to the statistics that importance metrics need.

What this module does not know: which of the four texts it is given, and what is done with the
statistics.

Notation: n windows, t tokens, i input columns of a site.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import torch
from torch import Tensor

from unicuco.errors import ModelError, TextError
from unicuco.models import site_module
from unicuco.types import ModelProfile, Site

if TYPE_CHECKING:  # a learner never needs it, and it takes 300 MB
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Bounds the memory of one forward pass: logits of 2,048 tokens at a vocabulary of 150,000 are 1.2
# GB.
_TOKENS_PER_BATCH: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSet:
    """Windows of tokens from one text.

    Attributes:
        ids: ``n x context`` int64.
        digest: sha256 of the ids and their shape, in hexadecimal.
    """

    ids: Tensor
    digest: str

    @classmethod
    def from_ids(cls, ids: Tensor) -> TokenSet:
        """Wrap ``n x context`` token ids, computing their digest."""
        whole = ids.to(torch.int64).contiguous()
        digest = hashlib.sha256(f"{tuple(whole.shape)}\n".encode())
        digest.update(whole.numpy().astype("<i8", copy=False).tobytes())
        return cls(ids=whole, digest=digest.hexdigest())

    @property
    def num_tokens(self) -> int:
        """Tokens in all windows."""
        return self.ids.numel()

    @property
    def context(self) -> int:
        """Tokens in one window."""
        return int(self.ids.shape[1])

    def batches(self, max_tokens: int = _TOKENS_PER_BATCH) -> Iterator[Tensor]:
        """Yield ``b x context`` slices of at most ``max_tokens`` tokens, one window at least."""
        yield from self.ids.split(max(1, max_tokens // self.context))


def read_text(path: Path) -> str:
    """Return a UTF-8 text file's contents.

    Raises:
        TextError: the file is missing, unreadable, empty or no UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from error
    except OSError as error:
        raise TextError(f"the text {path} can't be read: {error.strerror or error}") from error
    if not text.strip():
        raise TextError(f"the text {path} is empty; give a file with some text")
    return text


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, *, tokens: int | None, context: int
) -> TokenSet:
    """Cut full windows out of a text, evenly spaced over its whole length and never overlapping.

    Args:
        tokenizer: of the model; special tokens are not added.
        text: any length.
        tokens: how many in all, > 0; none for every full window that the text has. What is no
            multiple of ``context`` is met by slightly shorter windows, never exceeded, and missed
            by less than their number.
        context: tokens per window at most, > 0.

    Returns:
        ``n x context`` tokens.

    Raises:
        TextError: the text has fewer tokens than asked; the line says how many it has.
    """
    if context < 1 or (tokens is not None and tokens < 1):
        raise ValueError(f"tokens and context must be at least 1, got {tokens} and {context}")
    ids = torch.tensor(
        tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=torch.int64
    )
    available = len(ids)
    if tokens is None:
        tokens = max(1, available // context) * min(context, max(1, available))
    if available < tokens:
        raise TextError(
            f"the text has {available:,} tokens and {tokens:,} are needed; "
            "give a longer text or ask for fewer"
        )
    num_windows = -(-tokens // context)
    width = tokens // num_windows
    gaps = max(1, num_windows - 1)
    starts = [k * (available - width) // gaps for k in range(num_windows)]
    return TokenSet.from_ids(torch.stack([ids[start : start + width] for start in starts]))


@torch.no_grad()
def collect_input_norms(
    model: PreTrainedModel, profile: ModelProfile, tokens: TokenSet
) -> dict[str, Tensor]:
    """Run the text through the model and measure every site's inputs, in one pass over ``tokens``.

    Returns:
        As `measure_input_norms`.

    Raises:
        ModelError: a token lies outside the vocabulary, a site's inputs are NaN or infinite, or a
            site never ran.
    """
    check_vocabulary(profile, tokens)

    def run() -> None:
        for batch in tokens.batches():
            model(input_ids=batch.to(model.device), use_cache=False)

    return measure_input_norms(model, profile, run)


def measure_input_norms(
    model: PreTrainedModel, profile: ModelProfile, run: Callable[[], None]
) -> dict[str, Tensor]:
    """Measure the inputs of a profile's sites, which may be some of the model's, inside ``run``.

    Returns:
        Site path to ``i`` float32: the L2 norm of each input column over all tokens, summed in
        float64.

    Raises:
        ModelError: a site's inputs are NaN or infinite, or a site never ran.
    """
    sums: dict[str, Tensor] = {}

    def observe(site: Site, inputs: Tensor) -> None:
        total = inputs.flatten(0, -2).float().square().sum(dim=0, dtype=torch.float64)
        sums[site.path] = sums[site.path] + total if site.path in sums else total

    with watch_inputs(model, profile, observe):
        run()
    norms: dict[str, Tensor] = {}
    for site in profile.sites:
        if site.path not in sums:
            raise ModelError(
                f"{site.path} received no input from the calibration text; "
                "the model can't be pruned"
            )
        norm = sums[site.path].sqrt().float().cpu()
        if not bool(torch.isfinite(norm).all()):
            raise ModelError(
                f"the inputs of {site.path} are NaN or infinite on the calibration text"
            )
        norms[site.path] = norm
    return norms


@contextmanager
def watch_inputs(
    model: PreTrainedModel, profile: ModelProfile, observe: Callable[[Site, Tensor], None]
) -> Iterator[None]:
    """Call ``observe(site, inputs)`` with the ``... x i`` inputs of every site that runs inside."""
    with ExitStack() as hooks:
        for site in profile.sites:
            handle = site_module(model, site).register_forward_pre_hook(
                lambda _module, inputs, site=site: observe(site, cast(Tensor, inputs[0]))
            )
            hooks.callback(handle.remove)
        yield


def check_vocabulary(profile: ModelProfile, tokens: TokenSet) -> None:
    """Refuse tokens that the model does not know.

    Raises:
        ModelError: the line says which.
    """
    highest = int(tokens.ids.max())
    if highest >= profile.vocabulary_size:
        raise ModelError(
            f"the tokenizer gives token {highest}, but the model knows "
            f"{profile.vocabulary_size:,}; the tokenizer belongs to another model"
        )
