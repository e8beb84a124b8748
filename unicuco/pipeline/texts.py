"""The four texts of a model: the reference corpus, or a user's own file cut in three.

Calibration, search and validation text never overlap. The test text is not here: it is read by what
reports, never by what learns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from unicuco.allocate import TextPart
from unicuco.calibration import TokenSet, read_text, token_windows
from unicuco.errors import RequestError, TextError
from unicuco.evaluate.measure import windows_of
from unicuco.reference.corpus import TextName, held_out_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_CONTEXT: Final = 512
_PARTS: Final[tuple[TextName, ...]] = ("calibration", "search", "validation")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningTexts:
    """Token windows of the three texts that learning may read."""

    calibration: TokenSet
    search: TokenSet
    validation: TokenSet

    @property
    def digest(self) -> str:
        """One digest of all three."""
        parts = f"{self.calibration.digest}{self.search.digest}{self.validation.digest}"
        return hashlib.sha256(parts.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningSource:
    """A model's tokenizer with the file that its texts are cut from; none: the reference corpus.

    With ``tasks``, several files in place of one: a text is then equally many windows of each, one
    task after the other. The `TextSource` of allocators.
    """

    tokenizer: PreTrainedTokenizerBase
    source: Path | None
    tasks: tuple[tuple[str, Path], ...] = ()

    def windows(self, part: TextPart, *, tokens: int, context: int) -> TokenSet:
        """Return windows of the calibration or search text.

        Raises:
            TextError: the text can't be read or is too short.
        """
        share = tokens // max(1, len(self.tasks))
        return self._windows(part, tokens=share, context=context)

    def pool(self, part: TextPart, *, context: int) -> TokenSet:
        """Return every full window of the calibration or search text."""
        return self._windows(part, tokens=None, context=context)

    def _windows(self, part: TextPart, *, tokens: int | None, context: int) -> TokenSet:
        files: list[Path | None] = [path for _, path in self.tasks] or [self.source]
        texts = [dict(zip(_PARTS, _part_texts(file), strict=True))[part.value] for file in files]
        return _joined(
            [token_windows(self.tokenizer, t, tokens=tokens, context=context) for t in texts]
        )


def window_length(max_context: int, wanted: int | None) -> int:
    """Return tokens per window: what is wanted, or the model's context up to 512.

    Raises:
        TextError: more is wanted than the model reads at once.
    """
    if wanted is not None and wanted > max_context:
        raise TextError(
            f"the model reads at most {max_context:,} tokens at once; "
            f"a context of {wanted:,} is too long"
        )
    return min(max_context, _MAX_CONTEXT) if wanted is None else wanted


def learning_texts(
    tokenizer: PreTrainedTokenizerBase, source: Path | None, *, tokens: int, context: int
) -> LearningTexts:
    """Cut the three texts, ``tokens`` tokens each.

    Args:
        tokenizer: the model's.
        source: a UTF-8 file, of which each text gets a third in order; none: the reference corpus.
        tokens: per text.
        context: per window.

    Raises:
        TextError: the source can't be read or is too short.
    """
    parts = _part_texts(source)
    try:
        sets = [token_windows(tokenizer, part, tokens=tokens, context=context) for part in parts]
    except TextError as error:
        if source is None:
            raise
        raise TextError(
            f"{source} is cut into calibration, search and validation text, "
            f"and a third of it is too short: {error}"
        ) from error
    return LearningTexts(calibration=sets[0], search=sets[1], validation=sets[2])


def task_texts(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[tuple[str, Path]],
    *,
    tokens: int,
    context: int,
) -> LearningTexts:
    """Cut the three texts of several tasks: equally many windows of each file, in task order.

    Raises:
        TextError: a file can't be read or is too short for its share.
    """
    share = tokens // len(tasks)
    parts = [learning_texts(tokenizer, path, tokens=share, context=context) for _, path in tasks]
    return LearningTexts(
        calibration=_joined([part.calibration for part in parts]),
        search=_joined([part.search for part in parts]),
        validation=_joined([part.validation for part in parts]),
    )


def _joined(sets: Sequence[TokenSet]) -> TokenSet:
    return sets[0] if len(sets) == 1 else TokenSet.from_ids(torch.cat([s.ids for s in sets]))


def _part_texts(source: Path | None) -> list[str]:
    if source is None:
        return [held_out_text(part) for part in _PARTS]
    whole = read_text(source)
    third = len(whole) // 3
    return [whole[:third], whole[third : 2 * third], whole[2 * third :]]


def test_windows(
    tokenizer: PreTrainedTokenizerBase, source: Path | None, *, tokens: int | None, context: int
) -> TokenSet:
    """Return windows of the test text, all of it unless ``tokens``.

    The text is a file, or none: the reference corpus' test modules.
    """
    text = held_out_text("test") if source is None else read_text(source)
    return token_windows(tokenizer, text, tokens=tokens, context=context)


def check_screening(search: TokenSet, tokens: int | None) -> None:
    """Refuse to screen on what comes to the whole search text, for windows are judged whole.

    Raises:
        RequestError: it does.
    """
    if tokens is not None and windows_of(search.ids, tokens).numel() == search.ids.numel():
        raise RequestError(
            f"screen-tokens {tokens} come to the whole search text in windows of "
            f"{search.ids.shape[1]} tokens: give fewer, or more --tokens"
        )
