from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from unicuco.allocate.depth import (
    DEPTH_SCORES,
    DepthAllocator,
    DepthEvidence,
    WindowAllocator,
    measure_streams,
)
from unicuco.dimensions import Granularity, build_space
from unicuco.models import load_model
from unicuco.testing.cases import random_tokens
from unicuco.testing.tiny import tiny_model_folder

TOKENS = random_tokens(seed=5)


def evidence_of(folder: Path, granularity: Granularity) -> DepthEvidence:
    loaded = load_model(folder)
    return DepthEvidence(
        loaded=loaded,
        space=build_space(loaded.profile, ("depth",), granularity),
        granularity=granularity,
        calibration=TOKENS,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("depth") / "llama", num_blocks=4)


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("name", [*DEPTH_SCORES, "window_cosine"])
def test_budgets_are_met_by_removing_and_the_model_is_left_as_it_was(
    folder: Path, name: str, granularity: Granularity
) -> None:
    evidence = evidence_of(folder, granularity)
    before = evidence.loaded.model(input_ids=TOKENS.ids).logits
    made = WindowAllocator(evidence) if name == "window_cosine" else DepthAllocator(name, evidence)
    assert torch.equal(evidence.loaded.model(input_ids=TOKENS.ids).logits, before)
    space = evidence.space
    sparsities = [0.0, 0.2, 0.3, 0.5, 0.7]
    counts = []
    for sparsity, strategy in zip(sparsities, made.allocate(sparsities), strict=True):
        assert space.cost.kept_params(strategy.values) <= space.kept_for_sparsity(sparsity)
        assert set(strategy.values) <= {0.0, 1.0}
        counts.append(sum(strategy.values))
        if name == "window_cosine" and counts[-1]:
            gone = [k for k, value in enumerate(strategy.values) if value]
            assert gone == list(range(gone[0], gone[-1] + 1))
    assert counts == sorted(counts)
    assert counts[0] == 0


def test_scores_are_those_of_a_plain_reading(folder: Path) -> None:
    evidence = evidence_of(folder, Granularity.BLOCK)
    model = evidence.loaded.model
    with torch.no_grad():
        seen = model(input_ids=TOKENS.ids, output_hidden_states=True).hidden_states
    # The library's last state is after the final norm: only those between blocks are the stream.
    for block in range(3):
        expected = cosine_similarity(seen[block], seen[block + 1], dim=-1).mean()
        found = measure_streams(evidence).cosine[block, block + 1]
        assert float(found) == pytest.approx(float(expected), abs=1e-5)
    losses = DEPTH_SCORES["shortened_llama"](evidence)
    del model.model.layers[1]  # type: ignore[union-attr]
    model.config.num_hidden_layers = 3
    with torch.no_grad():
        logits = torch.cat([model(input_ids=b, use_cache=False).logits for b in TOKENS.batches()])
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS.ids[:, 1:].flatten())
    batches = len(list(TOKENS.batches()))
    assert float(losses[1]) / batches == pytest.approx(float(loss), rel=1e-4)


def test_streams_of_parts_and_of_blocks_agree_at_blocks(folder: Path) -> None:
    by_block = measure_streams(evidence_of(folder, Granularity.BLOCK))
    by_part = measure_streams(evidence_of(folder, Granularity.LAYER))
    torch.testing.assert_close(by_part.cosine[::2, ::2], by_block.cosine, atol=1e-5, rtol=0)
