from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from unicuco.surrogate import EPSILON, Intervals, Measured

# Of the excess: what all have in common, and single ones (log-normal, a root mean square).
PRIOR = math.hypot(0.1, 0.05 * math.exp(0.5**2))


def draw(n: int, windows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Validation and fresh KL of n strategies, and what a surrogate said of them.

    A text is hard or easy as a whole (0.3 per window in log KL); the surrogate errs by -0.2, by a
    wave along the front, and by 0.03 on each strategy.
    """
    generator = torch.Generator().manual_seed(seed)
    truth = torch.linspace(-4, 0, n, dtype=torch.float64)
    window = 0.3 * torch.randn(2, windows, generator=generator, dtype=torch.float64)
    kl = torch.exp(truth[:, None, None] + window)
    wave = 0.15 * torch.sin(truth)
    said = truth - 0.2 + wave + 0.03 * torch.randn(n, generator=generator, dtype=torch.float64)
    return kl[:, 0], kl[:, 1].mean(1), said


def front(kl: Tensor, said: Tensor, std: float = 0.0) -> Measured:
    """Measured strategies whose size falls by one with every nat of log KL."""
    return Measured(window_kl=kl, mean=said, std=torch.full_like(said, std), sizes=-said)


def calibrated(others: Measured | None = None, **changes: float) -> Intervals:
    """Calibrated on five strategies of which the surrogate says a tenth too little."""
    means = torch.linspace(-4, 0, 5, dtype=torch.float64)
    kl = (means + 0.1).exp()[:, None] * torch.tensor([0.9, 1.1], dtype=torch.float64) - EPSILON
    return Intervals.calibrate(front(kl, means, 0.01), others, **changes)


def width(intervals: Intervals, mean: float, std: float = 0.0, excess: float = 0.0) -> float:
    """hi95 / lo95 of one prediction, so many nats above the front of its size."""
    (p,) = intervals.predict(*(torch.tensor([x]).double() for x in (mean, std, -mean + excess)))
    return p.hi95 / p.lo95


def test_intervals_hold_nearly_all_fresh_measurements() -> None:
    inside = total = 0
    zeros = torch.zeros(12, dtype=torch.float64)
    for seed in range(60):
        validation, fresh, said = draw(12, 6, seed)
        predicted = Intervals.calibrate(front(validation, said)).predict(said, zeros, -said)
        for prediction, kl in zip(predicted, fresh.tolist(), strict=True):
            inside += prediction.lo95 <= kl <= prediction.hi95
            total += 1
    assert 0.90 < inside / total <= 1.0, inside / total


def test_what_the_surrogate_gets_wrong_along_the_front_is_corrected() -> None:
    validation, _, said = draw(12, 2000, 1)
    centre, variance = Intervals.calibrate(front(validation, said)).corrected(
        said, torch.zeros(12), -said
    )
    truth = validation.mean(1).log()
    assert float((said - truth).std()) > 0.09
    assert float((centre - truth).abs().mean()) < 0.04
    assert float(variance.max().sqrt()) < 0.1


def test_the_correction_is_that_of_a_process_averaged_by_evidence() -> None:
    validation, _, said = draw(9, 6, 3)
    found = Intervals.calibrate(front(validation, said))
    x, y = torch.tensor([found.means, found.residuals], dtype=torch.float64)

    eye = torch.eye(9, dtype=torch.float64)

    def kernel(a: Tensor, b: Tensor, amplitude: float, length: float) -> Tensor:
        apart = (a[:, None] - b) / length
        return 0.3**2 + amplitude**2 * torch.exp(-0.5 * apart.square())

    total, logs = 0.0, torch.zeros(3, dtype=torch.float64)
    for amplitude in (0.01, 0.03, 0.1, 0.3, 1.0):
        for length in (0.5, 1.0, 2.0, 4.0):
            for nugget in (0.01, 0.02, 0.04, 0.08, 0.16, 0.32):
                covariance = kernel(x, x, amplitude, length) + nugget**2 * eye
                normal = torch.distributions.MultivariateNormal(torch.zeros(9).double(), covariance)
                likelihood = math.exp(float(normal.log_prob(y)))
                total += likelihood
                logs += likelihood * torch.tensor([amplitude, length, nugget]).double().log()
    shape = (found.amplitude, found.length, found.nugget)
    assert shape == pytest.approx((logs / total).exp().tolist(), rel=1e-6)
    point = torch.tensor([-1.7], dtype=torch.float64)
    covariance = kernel(x, x, found.amplitude, found.length) + found.nugget**2 * eye
    cross = kernel(point, x, found.amplitude, found.length)
    solved = torch.linalg.solve(covariance, torch.stack([y, cross[0]], dim=1))
    centre, variance = found.corrected(point, torch.zeros(1), -point)
    assert float(centre) == pytest.approx(-1.7 + float(cross[0] @ solved[:, 0]), abs=1e-9)
    unsure = 0.3**2 + found.amplitude**2 - float(cross[0] @ solved[:, 1])
    expected = unsure + found.nugget**2 + found.text_variance
    assert float(variance) == pytest.approx(expected, abs=1e-9)


def test_texts_vary_by_what_windows_do_to_each_strategy_not_only_to_all_alike() -> None:
    means = torch.linspace(-4, 0, 4, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    seesaw = 0.1 * signs[:, None] * signs
    for hardness in (1 + seesaw, 1 + seesaw[:1]):
        kl = means.exp()[:, None] * hardness - EPSILON
        found = Intervals.calibrate(front(kl, means))
        # Two texts of four windows; one window's hardness has a variance of 0.01, 4/3 unbiased.
        assert found.text_variance == pytest.approx(2 * 0.01 * (4 / 3) / 4, rel=1e-6)


def test_a_deviation_beyond_the_fronts_own_widens_the_interval_by_its_scale() -> None:
    plain, scaled = calibrated(), calibrated(deviation_scale=4.0)
    assert width(plain, -2.0, 0.0) == width(plain, -2.0, 0.01) == width(scaled, -2.0, 0.01)
    assert width(plain, -2.0, 0.01) < width(plain, -2.0, 0.1) < width(scaled, -2.0, 0.1)
    _, near = scaled.corrected(torch.tensor([-2.0]), torch.tensor([0.01]), torch.tensor([2.0]))
    _, far = scaled.corrected(torch.tensor([-2.0]), torch.tensor([0.1]), torch.tensor([2.0]))
    assert float(far - near) == pytest.approx(16 * (0.1**2 - 0.01**2), rel=1e-6)
    assert calibrated(deviation_scale=0.5).deviation_scale == 1.0


def test_what_lies_above_the_front_of_its_size_is_less_sure_by_a_share_of_that() -> None:
    intervals = calibrated()
    assert (intervals.excess_bias, intervals.excess_scale) == (0.0, pytest.approx(PRIOR, rel=1e-3))
    assert width(intervals, -2.0) < width(intervals, -2.0, excess=0.5)
    assert width(intervals, -2.0, excess=-0.5) == width(intervals, -2.0), "below: as on it"
    point, std = torch.tensor([-2.0]), torch.tensor([0.01])
    _, near = intervals.corrected(point, std, -point)
    _, far = intervals.corrected(point, std, -point + 0.8)
    assert float(far - near) == pytest.approx((PRIOR * 0.8) ** 2, rel=3e-3)


def off_front(above: Tensor, log_kl: Tensor) -> Measured:
    """Strategies an excess of one nat above the front, whose windows are alike."""
    kl = log_kl.exp()[:, None].repeat(1, 4) - EPSILON
    return Measured(window_kl=kl, mean=above, std=torch.zeros_like(above), sizes=1.0 - above)


def test_the_share_is_the_one_that_fits_what_was_measured_off_the_front() -> None:
    validation, _, said = draw(12, 2000, 1)
    on_front = front(validation, said)
    above, truth = said[3:9], (validation.mean(1)[3:9] + EPSILON).log()
    for share, least, most in ((0.0, 0.0, 0.075), (0.3, 0.2, 0.45)):
        errors = share * torch.tensor([1.0, -1.0]).repeat(3).double()
        others = off_front(above, truth + errors)
        found = Intervals.calibrate(on_front, others)
        assert least <= found.excess_scale <= most, share
        assert abs(found.excess_bias) < 0.05
    nothing = Measured(**{k: v[:0] for k, v in vars_of(others).items()})
    assert Intervals.calibrate(on_front, nothing) == Intervals.calibrate(on_front)


def test_what_the_surrogate_gets_wrong_off_the_front_is_corrected() -> None:
    above = torch.linspace(-2.9, -0.1, 6, dtype=torch.float64)
    std = torch.zeros_like(above)
    corrected, _ = calibrated().corrected(above, std, -above)
    found = calibrated(off_front(above, corrected + 0.2))
    assert 0.1 < found.excess_bias < 0.2, "drawn a little to none"
    assert found.excess_scale < PRIOR
    centre, _ = found.corrected(above, std, 1.0 - above)
    assert torch.allclose(centre, corrected + found.excess_bias)
    same, _ = found.corrected(above, std, -above)
    assert torch.allclose(same, corrected), "on the front nothing changes"


def test_the_bias_is_the_posterior_mean_of_a_linear_model() -> None:
    plain = replace(calibrated(), excess_scale=0.0)
    generator = torch.Generator().manual_seed(0)
    above = torch.linspace(-2.9, -0.1, 6, dtype=torch.float64)
    noise = 0.1 * torch.randn(6, generator=generator, dtype=torch.float64)
    others = off_front(above, above + 0.1 + noise)
    bias, scale = plain._fitting_shares(others)
    centre, variance = plain.corrected(above, others.std, others.sizes)

    def posterior(share: float) -> tuple[float, float, float]:
        # All jointly Gaussian: errors of covariance diag(variance + share^2) + 0.1^2 1 1'.
        errors, ones = others.log_kl - centre, torch.ones(6, 1, dtype=torch.float64)
        covariance = (variance + share**2).diag() + 0.01 * ones @ ones.T
        gain = 0.01 * torch.linalg.solve(covariance, ones)[:, 0]
        left = 0.01 - 0.01 * float(gain.sum())
        normal = torch.distributions.MultivariateNormal(torch.zeros(6).double(), covariance)
        prior = -0.5 * (math.log(share / 0.05) / 0.5) ** 2
        return math.exp(float(normal.log_prob(errors)) + prior), float(gain @ errors), left

    grid = [0.01 * 50 ** (k / 17) for k in range(18)]
    likely, means, lefts = torch.tensor([posterior(share) for share in grid]).double().unbind(1)
    likely = likely / likely.sum()
    mean = float(likely @ means)
    square = float(likely @ (torch.tensor(grid).double().square() + lefts + means.square()))
    assert bias == pytest.approx(mean, rel=1e-4)
    assert scale == pytest.approx(math.sqrt(square - mean**2), rel=1e-4)


def test_kl_bends_below_that_of_a_model_that_knows_nothing() -> None:
    free, bound = calibrated(), calibrated(ceiling=4.0)
    points = torch.tensor([-4.0, -2.0, 1.0, 1.4, 2.5, 6.0], dtype=torch.float64)
    std = torch.zeros_like(points)
    open_centre, variance = free.corrected(points, std, -points)
    centre, same = bound.corrected(points, std, -points)
    expected = (open_centre.exp() ** -4 + 4.0**-4) ** -0.25
    assert torch.allclose(centre.exp(), expected, rtol=2e-3), "residuals are bent a little, too"
    assert torch.allclose(variance, same, rtol=1e-2)
    assert float(centre[-1].exp()) == pytest.approx(4.0, rel=1e-4)


def test_what_bends_is_straightened_before_it_is_looked_at() -> None:
    def bent(log_kl: Tensor) -> Tensor:
        return ((log_kl.exp() ** -4 + 8.0**-4) ** -0.25 - EPSILON)[:, None].repeat(1, 3)

    means = torch.linspace(-2, 1.2, 6, dtype=torch.float64)
    kl, std = bent(means + 0.2), torch.zeros(6, dtype=torch.float64)
    found = Intervals.calibrate(front(kl, means), ceiling=8.0)
    assert found.residuals == pytest.approx([0.2] * 6)
    assert float(kl[-1, 0]) < 0.99 * float((means[-1] + 0.2).exp())
    centre, _ = found.corrected(means, std, -means)
    assert torch.allclose(centre.exp(), kl[:, 0], rtol=0.01)
    above = means[:4] + 1.0
    others = Measured(window_kl=bent(above + 0.3), mean=above, std=std[:4], sizes=-means[:4])
    assert 0.05 < Intervals.calibrate(front(kl, means), others, ceiling=8.0).excess_bias < 0.1


def test_a_ceiling_that_was_passed_or_nearly_so_is_lifted() -> None:
    worst = calibrated().means[-1] + 0.1
    lifted = calibrated(ceiling=0.5)
    assert lifted.ceiling == pytest.approx(math.exp(worst) / 0.7)
    assert lifted.residuals[-1] < 0.1 + 0.07, "what was measured bends little"
    document = asdict(calibrated(ceiling=3.0))
    assert document.pop("ceiling") == 3.0
    assert Intervals.restore(document).ceiling is None, "as in older runs"
    with pytest.raises(ValueError, match="ceiling"):
        Intervals.restore({**document, "ceiling": 0.0})


def vars_of(measured: Measured) -> dict[str, Tensor]:
    names = ("window_kl", "mean", "std", "sizes")
    return {name: getattr(measured, name) for name in names}


def test_intervals_of_runs_from_before_sizes_were_kept_are_as_they_were() -> None:
    document = asdict(calibrated())
    del document["sizes"], document["excess_scale"], document["excess_bias"]
    old = Intervals.restore(document)
    assert width(old, -2.0, excess=0.5) == width(old, -2.0) == width(calibrated(), -2.0)
    with pytest.raises(ValueError, match="sizes"):
        Intervals.restore({**document, "sizes": [1.0]})


def test_predictions_outside_what_was_measured_are_less_sure() -> None:
    validation, _, said = draw(12, 2000, 1)
    intervals = Intervals.calibrate(front(validation, said))
    assert width(intervals, -2.0) < width(intervals, 2.0) < width(intervals, 4.0)


def test_fewer_strategies_give_wider_intervals() -> None:
    few, many = draw(4, 6, 5), draw(40, 6, 5)
    widths = [width(Intervals.calibrate(front(d[0], d[2])), -2.0) for d in (few, many)]
    assert widths[0] > widths[1]


def test_a_kl_of_nothing_has_a_finite_interval_from_zero() -> None:
    nothing = torch.full((1,), math.log(EPSILON / 2), dtype=torch.float64)
    (prediction,) = calibrated().predict(nothing, torch.tensor([0.1]).double(), -nothing)
    assert prediction.lo95 == prediction.mean == 0.0
    assert 0 <= prediction.hi95 < 1e-2


def test_one_window_says_nothing_of_how_texts_vary() -> None:
    validation, _, said = draw(5, 1, 2)
    intervals = Intervals.calibrate(front(validation, said))
    assert intervals.text_variance == 0.0
    assert intervals.degrees == 4


def test_it_is_the_same_after_json() -> None:
    intervals = calibrated(deviation_scale=3.0)
    assert Intervals.restore(json.loads(json.dumps(asdict(intervals)))) == intervals
    with pytest.raises(KeyError):
        Intervals.restore({"bias": 0.0})
    with pytest.raises(ValueError, match="two at least"):
        Intervals.restore({**asdict(intervals), "means": []})
