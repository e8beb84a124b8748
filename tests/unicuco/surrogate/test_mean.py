from __future__ import annotations

import torch
from torch import Tensor

from unicuco.allocate import AxisCurves
from unicuco.surrogate import EPSILON, CurveMean
from unicuco.surrogate.mean import Known

D = 6


def curves(seed: int = 0) -> AxisCurves:
    generator = torch.Generator().manual_seed(seed)
    knots = torch.linspace(0, 1, 257, dtype=torch.float64)
    scale = torch.exp(torch.randn(D, 1, generator=generator, dtype=torch.float64))
    return AxisCurves(0.1 * scale * knots.square())


def points(n: int, seed: int) -> Tensor:
    return torch.rand(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truth() -> CurveMean:
    generator = torch.Generator().manual_seed(5)
    return CurveMean(
        curves=curves(),
        scales=0.5 * torch.randn(D, generator=generator, dtype=torch.float64),
        tilts=0.5 * torch.randn(D, generator=generator, dtype=torch.float64),
        power=torch.tensor(1.1, dtype=torch.float64),
        offset=torch.tensor(0.2, dtype=torch.float64),
    )


def test_before_any_fit_it_is_the_sum_of_the_curves() -> None:
    u = points(5, 1)
    expected = (EPSILON + curves().values(u).sum(1)).log()
    torch.testing.assert_close(CurveMean.prior(curves()).values(u), expected)


def test_it_gives_its_own_gradient() -> None:
    leaf = points(7, 2).requires_grad_(True)
    mean = truth()
    (gradient,) = torch.autograd.grad(mean.values(leaf).sum(), leaf)
    torch.testing.assert_close(mean.gradients(leaf.detach()), gradient)


def test_few_values_with_derivatives_pin_down_every_axis() -> None:
    mean, u = truth(), points(6, 3)
    fitted = CurveMean.fit(curves(), u, mean.values(u), mean.gradients(u), u)
    fresh = points(50, 4)
    errors = {
        name: float((found.values(fresh) - mean.values(fresh)).square().mean().sqrt())
        for name, found in {
            "fitted": fitted,
            "values": CurveMean.fit(curves(), u, mean.values(u)),
            "prior": CurveMean.prior(curves()),
        }.items()
    }
    assert errors["fitted"] < 0.05
    assert errors["fitted"] < errors["values"] < errors["prior"]


def known(centre: Tensor, n: int) -> Known:
    nothing = torch.zeros(n, D, dtype=torch.float64)
    return Known(centre=centre, values=nothing[:, 0], derivatives=nothing)


def test_what_another_run_learned_helps_where_little_is_measured() -> None:
    mean, u, fresh = truth(), points(2, 3), points(50, 4)
    alone = CurveMean.fit(curves(), u, mean.values(u))
    guided = CurveMean.fit(curves(), u, mean.values(u), known=known(0.9 * mean.parameters, 2))
    errors = [(fit.values(fresh) - mean.values(fresh)).square().mean() for fit in (alone, guided)]
    assert errors[1] < 0.2 * errors[0]


def test_what_another_run_learned_yields_to_measurements() -> None:
    mean, u, fresh = truth(), points(20, 3), points(50, 4)
    misled = CurveMean.fit(
        curves(), u, mean.values(u), mean.gradients(u), u, known(-mean.parameters, 20)
    )
    assert (misled.values(fresh) - mean.values(fresh)).abs().max() < 0.1


def test_derivatives_need_not_be_measured_everywhere() -> None:
    mean, u = truth(), points(8, 5)
    fitted = CurveMean.fit(curves(), u, mean.values(u), mean.gradients(u[:3]), u[:3])
    fresh = points(50, 6)
    assert float((fitted.values(fresh) - mean.values(fresh)).abs().mean()) < 0.1


def test_at_the_dense_model_values_and_gradients_are_finite() -> None:
    corners = torch.stack([torch.zeros(D), torch.ones(D)]).double()
    mean = truth()
    assert bool(torch.isfinite(mean.values(corners)).all())
    assert bool(torch.isfinite(mean.gradients(corners)).all())


def test_a_restored_mean_is_the_same_to_the_bit() -> None:
    mean, u = truth(), points(9, 7)
    restored = CurveMean.restore(mean.state())
    assert torch.equal(restored.values(u), mean.values(u))
    assert torch.equal(restored.gradients(u), mean.gradients(u))
