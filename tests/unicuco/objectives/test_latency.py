from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unicuco.dimensions import Granularity, build_space
from unicuco.objectives import LatencyModel, dense_features, latency_features, leave_one_out
from unicuco.testing.profiles import make_profile
from unicuco.types import Strategy

PROFILE = make_profile([[(6, 6), (24, 6), (6, 12)], [(4, 4), (24, 6), (6, 12)], [(6, 6), (6, 6)]])
SPACE = build_space(PROFILE, ("depth", "width", "sparsity"))


def features_of(seed: int, count: int) -> Tensor:
    units = torch.rand(count, SPACE.num_axes, generator=torch.Generator().manual_seed(seed))
    return latency_features(SPACE.cost, SPACE.decode(units))


def times(seed: int, features: Tensor, spread: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return ``f x 2`` coefficients and the ``n x 2`` times that follow from them, with noise."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.rand(features.shape[1], 2, generator=generator, dtype=torch.float64) + 0.1
    true = true / features.amax(0)[:, None]
    noise = torch.rand(len(features), 2, generator=generator, dtype=torch.float64) - 0.5
    return true, (features @ true) * (1 + spread * noise)


def test_features_count_the_parts_of_a_kind_and_their_weights() -> None:
    named = dict.fromkeys(SPACE.names, 0.0)
    cases = {
        (): [1, 3, 36 + 16 + 36, 3, 216 + 216 + 36],
        (("depth/blocks.0.part_0", 1),): [1, 2, 16 + 36, 3, 216 + 216 + 36],
        (("width/blocks.1.part_1", 0.25),): [1, 3, 36 + 16 + 36, 3, 216 + 162 + 36],
        (("depth/blocks.2.part_1", 1), ("sparsity/blocks.0.site_1", 0.5)): [1, 3, 88, 2, 432],
    }
    for settings, expected in cases.items():
        strategy = Strategy(settings=tuple({**named, **dict(settings)}.items()))
        assert latency_features(SPACE.cost, [strategy]).tolist() == [expected]


def test_a_model_whose_parts_can_not_be_told_apart_has_one_kind() -> None:
    space = build_space(replace(PROFILE, parts=()), ("depth",), Granularity.BLOCK)
    assert dense_features(space.cost).tolist() == [[1, 3, PROFILE.num_site_weights]]


def test_zeros_of_masks_save_no_time_and_the_dense_model_has_all() -> None:
    masked = torch.zeros(1, SPACE.num_axes)
    masked[0, [a for a, axis in enumerate(SPACE.axes) if not axis.is_shape]] = 0.5
    dense = dense_features(SPACE.cost)
    assert torch.equal(latency_features(SPACE.cost, SPACE.decode(masked)), dense)
    assert dense[0, 1::2].tolist() == [3, 3]
    assert float(dense[0, 2::2].sum()) == PROFILE.num_site_weights


def test_a_fit_to_exact_times_predicts_every_other_shape_exactly() -> None:
    features, others = features_of(0, 12), features_of(1, 50)
    true, ms = times(2, features)
    model = LatencyModel.fit(features, ms, (1, 8))
    for k, batch in enumerate((1, 8)):
        expected = [
            sum(c * x for c, x in zip(true[:, k].tolist(), row, strict=True))
            for row in others.tolist()
        ]
        assert model.predict(others, batch).tolist() == pytest.approx(expected, rel=1e-9)
    assert float(leave_one_out(features, ms, (1, 8)).max()) < 1e-9


def slow_fit(features: Tensor, ms: Tensor) -> Tensor:
    """Minimise the sum of squared relative errors over x >= 0, one coordinate after the other."""
    matrix = (features / ms[:, None]).tolist()
    x = [0.0] * features.shape[1]
    for _ in range(1500):
        for j in range(len(x)):
            column = [row[j] for row in matrix]
            rest = [1 - sum(a * b for a, b in zip(row, x, strict=True)) for row in matrix]
            step = sum(c * r for c, r in zip(column, rest, strict=True))
            x[j] = max(0.0, x[j] + step / sum(c * c for c in column))
    return torch.tensor(x, dtype=torch.float64)


def test_a_fit_to_noisy_times_agrees_with_a_slow_one() -> None:
    features = features_of(3, 9)
    scaled = features / features.amax(0)
    _, ms = times(4, scaled, spread=1.6)
    ours = torch.tensor(LatencyModel.fit(scaled, ms[:, :1], (4,)).coefficients[0])
    slow = slow_fit(scaled, ms[:, 0])
    assert ours.tolist() == pytest.approx(slow.tolist(), abs=1e-4)
    assert min(ours.tolist()) == 0.0, "a case in which the bound at 0 matters"


@given(st.integers(0, 10_000), st.integers(1, 16))
def test_less_of_anything_is_never_slower(seed: int, batch: int) -> None:
    features = features_of(seed, 8)
    _, ms = times(seed + 1, features, spread=0.8)
    model = LatencyModel.fit(features, ms, (1, 16))
    units = torch.rand(1, SPACE.num_axes, generator=torch.Generator().manual_seed(seed))
    (start,) = SPACE.decode(units)
    rows = SPACE.encode([start]) + torch.eye(SPACE.num_axes)
    before = model.predict(latency_features(SPACE.cost, [start]), batch)
    after = model.predict(latency_features(SPACE.cost, SPACE.decode(rows.clamp(0, 1))), batch)
    assert bool((after <= before + 1e-12).all())


def test_between_two_batches_times_are_linear_and_outside_there_are_none() -> None:
    model = LatencyModel(batches=(2, 4, 12), coefficients=((1.0, 0.0), (3.0, 1.0), (4.0, 1.0)))
    row = torch.tensor([[1.0, 10.0]])
    found = [model.predict(row, batch).item() for batch in (2, 3, 4, 6, 12)]
    assert found == pytest.approx([1.0, 7.0, 13.0, 13.25, 14.0])
    assert [model.covers(batch) for batch in (1, 2, 12, 13)] == [False, True, True, False]
    with pytest.raises(ValueError, match="batch 13 lies outside 2 to 12"):
        model.predict(row, 13)


def test_an_odd_measurement_shows_when_it_is_left_out() -> None:
    features = features_of(5, 10)
    _, ms = times(6, features)
    ms[4, 1] *= 2
    errors = leave_one_out(features, ms, (1, 2))
    assert float(errors[:, 0].max()) < 1e-9
    assert errors[:, 1].argmax() == 4
    assert float(errors[4, 1]) == pytest.approx(0.5, rel=1e-6)


def test_a_model_survives_json() -> None:
    features = features_of(7, 8)
    model = LatencyModel.fit(features, times(8, features, spread=0.3)[1], (1, 4))
    assert LatencyModel.from_dict(json.loads(json.dumps(model.to_dict()))) == model


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"batches": [1]}, KeyError),
        ({"batches": 1, "coefficients": [[1]]}, TypeError),
        ({"batches": [], "coefficients": []}, ValueError),
        ({"batches": [4, 1], "coefficients": [[1], [1]]}, ValueError),
        ({"batches": [0, 1], "coefficients": [[1], [1]]}, ValueError),
        ({"batches": [1, 4], "coefficients": [[1]]}, ValueError),
        ({"batches": [1, 4], "coefficients": [[1], [1, 2]]}, ValueError),
        ({"batches": [1], "coefficients": [[-1]]}, ValueError),
        ({"batches": [1], "coefficients": [[float("nan")]]}, ValueError),
        ({"batches": [1], "coefficients": [["much"]]}, ValueError),
    ],
)
def test_what_is_no_model_is_refused(fields: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        LatencyModel.from_dict(fields)
