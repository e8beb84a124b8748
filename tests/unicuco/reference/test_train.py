from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from unicuco.models import load_model, load_tokenizer
from unicuco.reference import train as module
from unicuco.reference.train import (
    CONTEXT,
    TrainOptions,
    batches,
    build_model,
    build_tokenizer,
    learning_rate_factor,
    tokenise,
)

TEXTS = [f"def add_{n}(left, right):\n    return left + right * {n}\n" * 30 for n in range(12)]


def test_every_text_of_any_letters_comes_back_from_its_tokens() -> None:
    tokenizer = build_tokenizer(TEXTS)
    for text in (TEXTS[3], "naïve – Ω\t\x00🙂", ""):
        assert tokenizer.decode(tokenise(tokenizer, [text])[:-1].tolist()) == text
    ids = tokenise(tokenizer, TEXTS[:2])
    assert ids[-1] == 0
    assert int((ids == 0).sum()) == 2
    assert len(ids) < len("".join(TEXTS[:2])) / 2


def test_every_epoch_visits_windows_that_do_not_overlap() -> None:
    stream = torch.arange(10 * CONTEXT)
    first = list(islice(batches(stream, 2, seed=1), 4))
    assert all(window.shape == (2, CONTEXT + 1) for window in first)
    starts = torch.cat(first)[:, 0].sort().values
    assert int(starts.diff().min()) >= CONTEXT
    again = list(islice(batches(stream, 2, seed=1), 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_rate_warms_up_holds_and_decays() -> None:
    factors = [learning_rate_factor(k / 100, 0.05) for k in range(101)]
    assert factors[0] < 0.01
    assert factors[10:51] == [1.0] * 41
    assert factors[50:] == sorted(factors[50:], reverse=True)
    assert factors[100] == 0.0


def test_the_model_has_the_size_that_is_promised() -> None:
    model = build_model(seed=0)
    assert 6e6 <= sum(p.numel() for p in model.parameters()) <= 7.5e6
    assert model.config.num_hidden_layers == 8


def test_a_short_training_writes_a_model_that_loads_with_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "training_texts", lambda: TEXTS)
    monkeypatch.setattr(module, "held_out_text", lambda name: TEXTS[0])
    measured = module.train(tmp_path / "model", TrainOptions(steps=2, batch=1))
    assert "training tokens" in capsys.readouterr().out
    loaded = load_model(tmp_path / "model")
    assert loaded.profile.num_blocks == 8
    assert load_tokenizer(tmp_path / "model").decode([0]) == "<|endoftext|>"
    card = (tmp_path / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    for words in (
        "standard library",
        "2 steps",
        f"perplexity {measured['test_perplexity']:.2f}",
        f"{measured['test_bits_per_byte']:.3f} bits per byte",
        f"{measured['xz_bits_per_byte']:.3f} bits per byte",
    ):
        assert words in card
