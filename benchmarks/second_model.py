"""A second model of another architecture, trained on the spot: a Qwen2 of 2.4 million parameters.

It learns WikiText-2's training split with a byte-level BPE of its own, in a quarter of an hour on
one core, and is kept under ``out/benchmarks`` (ignored by git). The text lies in ``../shared/data``
where that is present; nothing is fetched. Searching, learning and calibration then see the
validation split, and the test split is measured on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.ledger import WORK
from unicuco.reference.train import (
    CONTEXT,
    VOCABULARY,
    TrainOptions,
    build_tokenizer,
    tokenise,
    train_steps,
)

SECOND = "wikitext"
DATA = Path(__file__).parent.parent.parent / "shared" / "data"
_TEXTS = DATA / "wikitext2"
_MINUTES = 15.0
_STEPS = 1500
_WARMUP = 0.03  # of the steps


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to compare on, and its texts (none: the reference corpus')."""

    path: str
    calibration: Path | None = None
    test: Path | None = None


def resolve(model: str) -> Subject:
    """Return the model that a name means, training the second one where it is not there yet."""
    if model != SECOND:
        return Subject(path=model)
    if not _TEXTS.is_dir():
        raise SystemExit(f"{SECOND} is trained on WikiText-2, which is not at ../shared/data")
    folder = WORK / "models" / SECOND
    if not (folder / "model.safetensors").exists():
        train(folder, minutes=_MINUTES)
    return Subject(path=str(folder), calibration=_TEXTS / "valid.txt", test=_TEXTS / "test.txt")


def train(folder: Path, *, minutes: float, steps: int = _STEPS, seed: int = 0) -> None:
    """Train and write the model; the schedule ends after ``steps`` or ``minutes`` of wall time."""
    torch.set_num_threads(1)
    text = (_TEXTS / "train.txt").read_text(encoding="utf-8")
    articles = text.split("\n = ")  # the tokenizer learns from pieces of bounded length
    tokenizer = build_tokenizer(articles)
    stream = tokenise(tokenizer, articles)
    model = build(seed)
    options = TrainOptions(
        steps=steps,
        minutes=minutes,
        learning_rate=4e-3,
        warmup_steps=round(_WARMUP * steps),
        seed=seed,
    )
    for step, progress, loss in train_steps(model, stream, options):
        if step % 50 == 0:
            print(f"{SECOND}: step {step}, {progress:.0%}, loss {loss:.3f}", flush=True)
    _save(model, tokenizer, folder)


def build(seed: int) -> Qwen2ForCausalLM:
    """Build the untrained model: 6 blocks, 42 sites, biases on queries, keys and values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the library's initialiser takes no generator
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=VOCABULARY,
                hidden_size=160,
                intermediate_size=448,
                num_hidden_layers=6,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
            )
        )


def _save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.eval().save_pretrained(folder)  # the weights last: they say that training was finished
