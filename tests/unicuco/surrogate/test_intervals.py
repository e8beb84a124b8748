from __future__ import annotations

import math

import pytest
import torch

from unicuco.surrogate import EPSILON, Intervals


def draw(n: int, windows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Validation and fresh KL of n strategies, and what a surrogate with bias 0.2 said of them.

    A text is hard or easy as a whole (0.3 per window in log KL), and the surrogate errs by 0.1.
    """
    generator = torch.Generator().manual_seed(seed)
    truth = torch.linspace(-4, 0, n, dtype=torch.float64)
    window = 0.3 * torch.randn(2, windows, generator=generator, dtype=torch.float64)
    kl = torch.exp(truth[:, None, None] + window)
    said = truth - 0.2 + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
    return kl[:, 0], kl[:, 1].mean(1), said


def test_intervals_hold_nearly_all_fresh_measurements() -> None:
    inside = total = 0
    for seed in range(60):
        validation, fresh, said = draw(12, 6, seed)
        intervals = Intervals.calibrate(validation, said)
        for prediction, kl in zip(
            intervals.predict(said, torch.zeros(12).double()), fresh.tolist(), strict=True
        ):
            inside += prediction.lo95 <= kl <= prediction.hi95
            total += 1
    assert 0.90 < inside / total <= 1.0, inside / total


def test_a_biased_surrogate_is_corrected() -> None:
    validation, _, said = draw(12, 200, 1)
    assert Intervals.calibrate(validation, said).bias == pytest.approx(0.25, abs=0.1)


def test_what_the_surrogate_does_not_know_widens_the_interval_around_the_same_mean() -> None:
    intervals = Intervals(bias=0.1, variance=0.01, degrees=11)
    mean = torch.full((3,), -1.0, dtype=torch.float64)
    narrow, wide, wider = intervals.predict(mean, torch.tensor([0.0, 0.1, 0.5]).double())
    assert narrow.mean == wide.mean == wider.mean == pytest.approx(math.exp(-0.9) - EPSILON)
    assert wider.lo95 < wide.lo95 < narrow.lo95 < narrow.hi95 < wide.hi95 < wider.hi95


def test_fewer_strategies_give_wider_intervals() -> None:
    mean, std = torch.zeros(1).double(), torch.zeros(1).double()
    widths = [
        Intervals(bias=0.0, variance=0.04, degrees=degrees).predict(mean, std)[0].hi95
        for degrees in (2, 5, 50)
    ]
    assert widths[0] > widths[1] > widths[2] > math.exp(1.96 * 0.2) - EPSILON


def test_a_kl_of_nothing_has_a_finite_interval_from_zero() -> None:
    intervals = Intervals(bias=-0.5, variance=0.04, degrees=11)
    mean = torch.tensor([math.log(EPSILON)], dtype=torch.float64)
    (prediction,) = intervals.predict(mean, torch.tensor([0.1]).double())
    assert prediction.lo95 == prediction.mean == 0.0
    assert 0 <= prediction.hi95 < 1e-3


def test_one_window_says_nothing_of_how_texts_vary() -> None:
    validation, _, said = draw(5, 1, 2)
    intervals = Intervals.calibrate(validation, said)
    assert math.isfinite(intervals.variance)
    assert intervals.degrees == 4
