"""The committed weights: what the issue asks of them, on samples small enough for every run."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from unicuco.calibration import collect_input_norms, token_windows
from unicuco.dimensions import build_space
from unicuco.importance import METRICS
from unicuco.models import LoadedModel, load_model, load_tokenizer, read_site, resolve_model
from unicuco.ranks import build_ranks, cut
from unicuco.reference.corpus import held_out_text

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model("reference")


@pytest.fixture(scope="module")
def reference() -> LoadedModel:
    return load_model("reference")


def test_the_files_are_weights_and_tokenizer_as_safetensors_and_json(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "MODEL_CARD.md"} <= names
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".md"}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16 * MEGABYTE


def test_the_weights_are_eight_llama_blocks_in_bfloat16(
    folder: Path, reference: LoadedModel
) -> None:
    profile = reference.profile
    assert profile.architecture == "LlamaForCausalLM"
    assert profile.num_blocks == 8
    assert 6_000_000 <= profile.total_params <= 7_500_000
    assert len(profile.sites) == 8 * 7
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}


def test_the_card_states_corpus_steps_and_a_quality_that_is_good_enough(folder: Path) -> None:
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "standard library" in card
    assert re.search(r"[\d,]+ steps", card)
    perplexity = re.search(r"perplexity ([\d.]+)", card)
    assert perplexity is not None
    own, xz = (float(bits) for bits in re.findall(r"([\d.]+) bits per byte", card))
    assert own <= 1.6
    assert own < xz


@torch.no_grad()
def _nll(loaded: LoadedModel, windows: torch.Tensor) -> float:
    """Mean negative log likelihood of next tokens, nats."""
    total = 0.0
    for window in windows.split(2):
        logits = loaded.model(input_ids=window, use_cache=False).logits[:, :-1].flatten(0, 1)
        labels = window[:, 1:].flatten()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return total / (windows.shape[0] * (windows.shape[1] - 1))


@pytest.mark.slow
def test_the_test_text_costs_few_bits_and_half_of_the_weights_are_missed(
    folder: Path, reference: LoadedModel
) -> None:
    tokenizer, text = load_tokenizer(folder), held_out_text("test")
    windows = token_windows(tokenizer, text, tokens=4096, context=512).ids
    dense = _nll(reference, windows)
    text_tokens = len(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    assert dense / math.log(2) * text_tokens / len(text.encode()) <= 1.6
    calibration = token_windows(tokenizer, held_out_text("calibration"), tokens=2048, context=512)
    profile = reference.profile
    norms = collect_input_norms(reference.model, profile, calibration)
    ranks = build_ranks(reference.model, profile, METRICS["wanda"], norms).ranks
    drops = build_space(profile).cost.site_drops([0.5] * len(profile.sites))
    for site in profile.sites:
        weight = read_site(reference.model, site)
        cut(weight, ranks[site.path], drops[site.path], out=weight)
    assert math.exp(_nll(reference, windows) - dense) >= 1.2


def test_the_tokenizer_gives_every_text_back(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 4096
    for text in ("def f(x):\n    return x\n", "naïve – Ω\t🙂"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
