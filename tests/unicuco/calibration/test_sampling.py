from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unicuco.calibration import TokenSet
from unicuco.calibration.sampling import (
    cluster,
    coverage_distance,
    draw_evenly,
    embed_windows,
    sample_clustered,
    sample_random,
)
from unicuco.errors import RequestError, TextError
from unicuco.models import LoadedModel, load_model
from unicuco.pipeline import LearnOptions
from unicuco.pipeline.preparation import prepare

KINDS = ((60, 0), (25, 60), (10, 120), (5, 180))  # windows of a kind, and where its tokens begin
SAMPLE = 8


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(tiny_llama)


@pytest.fixture(scope="module")
def pool() -> TokenSet:
    """A hundred windows of four kinds of text, most of one kind, in no order."""
    generator = torch.Generator().manual_seed(1)
    parts = [
        start + torch.randint(1, 3, (count, 24), generator=generator) for count, start in KINDS
    ]
    return TokenSet.from_ids(torch.cat(parts)[torch.randperm(100, generator=generator)])


@pytest.fixture(scope="module")
def embedded(model: LoadedModel, pool: TokenSet) -> Tensor:
    return embed_windows(model.model, pool)


def positions(pool: TokenSet, sample: TokenSet) -> list[int]:
    rows = {tuple(row): k for k, row in enumerate(pool.ids.tolist())}
    return [rows[tuple(row)] for row in sample.ids.tolist()]


def both_draws(model: LoadedModel, pool: TokenSet) -> tuple[list[list[int]], list[list[int]]]:
    seeds = range(12)
    clustered = [
        positions(pool, sample_clustered(model.model, pool, SAMPLE, seed=s)) for s in seeds
    ]
    random = [positions(pool, sample_random(pool, SAMPLE, seed=s)) for s in seeds]
    return clustered, random


def test_a_window_is_embedded_by_its_mean_last_hidden_state(
    model: LoadedModel, pool: TokenSet, embedded: Tensor
) -> None:
    with torch.no_grad():
        states = model.model(input_ids=pool.ids[:3], output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(embedded[:3], states.mean(1))
    assert embedded.shape == (100, states.shape[-1])


def test_a_clustered_sample_covers_the_pool_better_than_a_random_one_of_its_size(
    model: LoadedModel, pool: TokenSet, embedded: Tensor
) -> None:
    clustered, random = both_draws(model, pool)
    distances = [
        [coverage_distance(embedded, chosen) for chosen in draws] for draws in (clustered, random)
    ]
    assert all(len(set(chosen)) == SAMPLE for chosen in clustered + random)
    assert sum(distances[0]) < 0.95 * sum(distances[1])
    assert max(distances[0]) < max(distances[1])


def test_clustered_samples_differ_less_from_draw_to_draw_than_random_ones(
    model: LoadedModel, pool: TokenSet, embedded: Tensor
) -> None:
    spreads = [
        torch.stack([embedded[chosen].mean(0) for chosen in draws]).var(0).sum()
        for draws in both_draws(model, pool)
    ]
    assert float(spreads[0]) < 0.7 * float(spreads[1])


def test_the_seed_decides_the_sample(model: LoadedModel, pool: TokenSet) -> None:
    def draw(seed: int) -> str:
        return sample_clustered(model.model, pool, SAMPLE, seed=seed).digest

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_groups_of_far_apart_points_are_found() -> None:
    points = torch.cat([torch.full((n, 2), 100.0 * n) for n in (3, 5, 2)])
    points += 0.01 * torch.arange(10)[:, None]
    labels = cluster(points, 3, seed=0)
    assert [len({*labels[a:b]}) for a, b in ((0, 3), (3, 8), (8, 10))] == [1, 1, 1]
    assert len({*labels}) == 3
    assert len({*cluster(torch.zeros(6, 2), 3, seed=0)}) == 1  # no more groups than points


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    count=st.integers(1, 30),
    seed=st.integers(0, 3),
)
def test_groups_give_equally_many_as_far_as_they_reach(
    sizes: list[int], count: int, seed: int
) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    chosen = draw_evenly(labels, count, seed=seed)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, len(labels))
    taken = [sum(labels[k] == label for k in chosen) for label in range(len(sizes))]
    unfinished = [taken[k] for k, size in enumerate(sizes) if taken[k] < size]
    if unfinished:
        assert max(taken) - min(unfinished) <= 1


def test_a_pool_smaller_than_the_sample_is_refused(model: LoadedModel, pool: TokenSet) -> None:
    with pytest.raises(TextError, match="100 windows of 24 tokens and 101 are to be drawn"):
        sample_clustered(model.model, pool, 101, seed=0)


def test_learning_can_draw_its_calibration_windows_by_groups(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    def options(sampling: str) -> LearnOptions:
        return LearnOptions(
            model=str(tiny_llama), out=tmp_path, calibration=tiny_text_file, tokens=256,
            context=32, calibration_sampling=sampling,
        )  # fmt: skip

    even, clustered = (
        prepare(options(sampling), tmp_path, lambda step: None)
        for sampling in ("even", "clustered")
    )
    assert clustered.texts.calibration.ids.shape == even.texts.calibration.ids.shape
    assert clustered.texts.calibration.digest != even.texts.calibration.digest
    assert clustered.texts.search.digest == even.texts.search.digest
    (passes,) = (cost for cost in clustered.costs if cost.purpose == "sampling")
    assert passes.cost_units == passes.tokens / 256 > 1
    assert "calibration_sampling" not in options("even").decisive()
    assert options("clustered").decisive()["calibration_sampling"] == "clustered"
    with pytest.raises(RequestError, match="calibration-sampling must be one of even, clustered"):
        options("best")
