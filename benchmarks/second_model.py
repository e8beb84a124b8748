"""Other models, trained on the spot in a quarter of an hour on one core each.

``wikitext`` is of another architecture: a Qwen2 of 2.4 million parameters. It learns WikiText-2's
training split with a byte-level BPE of its own. The text lies in ``../shared/data`` where that is
present; nothing is fetched. Searching, learning and calibration then see the validation split, and
the test split is measured on.

``smaller`` is a smaller sibling of the reference model: a Llama of half its blocks and 1.8 million
parameters, which learns the same text with the same tokenizer.

Both are kept under ``out/benchmarks`` (ignored by git).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from benchmarks.ledger import WORK
from unicuco.models import resolve_model
from unicuco.reference.corpus import training_texts
from unicuco.reference.train import (
    CONTEXT,
    VOCABULARY,
    TrainOptions,
    build_tokenizer,
    tokenise,
    train_steps,
)

SECOND = "wikitext"
SMALLER = "smaller"
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
    """Return the model that a name means, training it where it is one of ours and not there yet."""
    if model == SMALLER:
        return Subject(path=str(_trained(SMALLER)))
    if model != SECOND:
        return Subject(path=model)
    if not _TEXTS.is_dir():
        raise SystemExit(f"{SECOND} is trained on WikiText-2, which is not at ../shared/data")
    path = str(_trained(SECOND))
    return Subject(path=path, calibration=_TEXTS / "valid.txt", test=_TEXTS / "test.txt")


def _trained(name: str) -> Path:
    folder = WORK / "models" / name
    if not (folder / "model.safetensors").exists():
        train(name, folder, minutes=_MINUTES)
    return folder


def train(name: str, folder: Path, *, minutes: float, steps: int = _STEPS, seed: int = 0) -> None:
    """Train and write a model; the schedule ends after ``steps`` or ``minutes`` of wall time."""
    torch.set_num_threads(1)
    tokenizer, stream = _smaller_text() if name == SMALLER else _second_text()
    model = build(name, seed)
    options = TrainOptions(
        steps=steps,
        minutes=minutes,
        learning_rate=4e-3,
        warmup_steps=round(_WARMUP * steps),
        seed=seed,
    )
    for step, progress, loss in train_steps(model, stream, options):
        if step % 50 == 0:
            print(f"{name}: step {step}, {progress:.0%}, loss {loss:.3f}", flush=True)
    _save(model, tokenizer, folder)


def _second_text() -> tuple[PreTrainedTokenizerFast, Tensor]:
    text = (_TEXTS / "train.txt").read_text(encoding="utf-8")
    articles = text.split("\n = ")  # the tokenizer learns from pieces of bounded length
    tokenizer = build_tokenizer(articles)
    return tokenizer, tokenise(tokenizer, articles)


def _smaller_text() -> tuple[PreTrainedTokenizerFast, Tensor]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(resolve_model("reference"))
    return tokenizer, tokenise(tokenizer, training_texts())


def build(name: str, seed: int) -> PreTrainedModel:
    """Build an untrained model: with 4 blocks the smaller one; the second with 6 and biases."""
    shape: dict[str, Any] = {  # Any: configurations name types for each of their arguments
        "vocab_size": VOCABULARY,
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the library's initialiser takes no generator
        if name == SMALLER:
            return LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **shape))
        return Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=6, **shape))


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.eval().save_pretrained(folder)  # the weights last: they say that training was finished
