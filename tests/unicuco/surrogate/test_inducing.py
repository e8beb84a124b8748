"""The process by inducing points: against textbook formulas, and against the exact one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unicuco.errors import SurrogateError
from unicuco.surrogate.inducing import InducingProcess, log_likelihood, tuned_kernel
from unicuco.surrogate.kernel import as_rows
from unicuco.surrogate.process import ExactProcess, Rows, ascend, make_kernel

D = 3


def points(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, D, generator=generator, dtype=torch.float64)


def data(count: int, *, derivatives: bool) -> Rows:
    """Rows of a function with a wave in it: values, and derivatives along the first axis."""
    where = points(count, 1)
    rows, targets = [as_rows(where)], [torch.sin(3 * where.sum(1))]
    if derivatives:
        along = torch.zeros_like(where)
        along[:, 0] = 1.0
        rows.append(as_rows(where, along))
        targets.append(3 * torch.cos(3 * where.sum(1)))
    noise = torch.linspace(0.01, 0.05, len(torch.cat(targets)), dtype=torch.float64)
    return Rows(torch.cat(rows), torch.cat(targets), noise)


def kernel(scale: float = 0.7) -> torch.nn.Module:
    made = make_kernel(D)
    made.outputscale = torch.tensor(scale, dtype=torch.float64)
    made.base_kernel.lengthscale = torch.tensor([[0.6, 0.9, 1.3]], dtype=torch.float64)
    return made.requires_grad_(False)


def fitted(known: Rows, inducing: Tensor) -> InducingProcess:
    return InducingProcess.fit(kernel(), inducing, known)


def dense(
    process: InducingProcess, inducing: Tensor, known: Rows, asked: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance by the projected covariance of all rows, N x N."""
    k = process._base.forward
    u, scale = as_rows(inducing), process._scale
    inverse = torch.linalg.inv(k(u, u))
    projected = scale * k(known.rows, u) @ inverse @ k(u, known.rows) + known.noise.diag()
    cross = scale * k(as_rows(asked), u) @ inverse @ k(u, known.rows)
    weights = torch.linalg.solve(projected, cross.mT)
    return weights.mT @ known.targets, scale - (cross * weights.mT).sum(1)


@pytest.mark.parametrize("derivatives", [False, True])
def test_it_predicts_what_the_projected_covariance_of_all_rows_does(derivatives: bool) -> None:
    known, inducing, asked = data(40, derivatives=derivatives), points(9, 2), points(25, 3)
    process = fitted(known, inducing)
    mean, std = process.predict(asked)
    expected, variance = dense(process, inducing, known, asked)
    assert torch.allclose(mean, expected, atol=1e-8)
    assert torch.allclose(std.square(), variance, atol=1e-8)
    assert torch.allclose(process.predict_mean(asked), mean)


def test_with_every_point_inducing_it_is_the_exact_process() -> None:
    known, asked = data(20, derivatives=False), points(15, 3)
    process = fitted(known, known.rows[:, :D])
    exact = ExactProcess(known)
    exact.covar_module.load_state_dict(process._kernel.state_dict())
    exact.freeze()
    for own, other in zip(process.predict(asked), exact.predict(asked), strict=True):
        assert torch.allclose(own, other, atol=1e-6)


@pytest.mark.parametrize("derivatives", [False, True])
def test_hyperparameters_are_judged_by_the_likelihood_of_rows_that_are_independent_given_u(
    derivatives: bool,
) -> None:
    known, inducing, made = data(40, derivatives=derivatives), points(9, 2), kernel()
    made.requires_grad_(True)
    k, u, scale = made.base_kernel.forward, as_rows(inducing), made.outputscale
    projected = k(known.rows, u) @ torch.linalg.inv(k(u, u)) @ k(u, known.rows)
    left_open = k(known.rows, known.rows).diag() - projected.diag()
    covariance = scale * (projected + left_open.diag()) + known.noise.diag()
    normal = torch.distributions.MultivariateNormal(torch.zeros(len(covariance)), covariance)
    expected, found = normal.log_prob(known.targets), log_likelihood(made, inducing, known)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for own, other in zip(
        torch.autograd.grad(found, [*made.parameters()]),
        torch.autograd.grad(expected, [*made.parameters()]),
        strict=True,
    ):
        assert torch.allclose(own, other, rtol=1e-5)


def test_steps_take_the_parts_in_turns_and_see_as_much_of_the_priors() -> None:
    made, parts = make_kernel(D), [data(n, derivatives=False) for n in (4, 5)]
    made.outputscale = torch.tensor(2.0, dtype=torch.float64)
    seen: list[Rows] = []
    gradients: list[Tensor] = []
    made.raw_outputscale.register_hook(gradients.append)

    def nothing(turn: Rows) -> Tensor:
        seen.append(turn)
        return torch.zeros((), dtype=torch.float64)

    ascend(made, parts, nothing, [0.0] * 3)
    assert [len(turn.targets) for turn in seen] == [4, 5, 4]
    prior = made.outputscale_prior.log_prob(made.outputscale)
    (whole,) = torch.autograd.grad(prior, made.raw_outputscale)
    for gradient, part in zip(gradients, seen, strict=False):
        assert torch.allclose(gradient, -whole / 2 / len(part.targets))


def test_tuning_finds_the_axis_that_matters() -> None:
    where = points(200, 4)
    targets = 0.5 * torch.sin(6 * where[:, 0]) + 0.1 * where[:, 1]
    noise = torch.full_like(targets, 1e-4)
    turns = [Rows(as_rows(where[k::2]), targets[k::2], noise[k::2]) for k in range(2)]
    lengths = tuned_kernel(turns, 40, 30).base_kernel.lengthscale[0]
    assert lengths[0] < 0.5 * min(lengths[1:])
    untouched = tuned_kernel(turns, 0, 30).base_kernel.lengthscale[0]
    assert torch.equal(untouched, make_kernel(D).base_kernel.lengthscale[0])


def test_its_scale_is_the_most_likely_one() -> None:
    known, inducing = data(60, derivatives=True), points(12, 2)
    process = fitted(known, inducing)
    k, u = process._base.forward, as_rows(inducing)
    shape = k(known.rows, u) @ torch.linalg.inv(k(u, u)) @ k(u, known.rows)

    def log_posterior(scale: Tensor) -> float:
        projected = scale * shape + known.noise.diag()
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(projected)), projected)
        prior = process._kernel.outputscale_prior.log_prob(scale)
        return float(normal.log_prob(known.targets) + prior)

    best = log_posterior(process._scale)
    assert best > max(log_posterior(process._scale * factor) for factor in (0.8, 1.25))


def test_left_out_errors_are_those_of_a_process_that_never_saw_the_evaluation() -> None:
    known, inducing = data(30, derivatives=True), points(8, 2)
    process = fitted(known, inducing)
    errors, variances, noises = process.left_out()
    assert len(errors) == 30
    for number in (0, 11, 29):  # values come first
        place = known.rows[number, :D]
        others = (known.rows[:, :D] != place).any(1)
        rest = Rows(known.rows[others], known.targets[others], known.noise[others])
        mean, variance = dense(process, inducing, rest, place[None])
        noise = float(known.noise[number])
        assert float(errors[number]) == pytest.approx(float(known.targets[number] - mean), abs=1e-8)
        assert float(variances[number]) == pytest.approx(float(variance) + noise, rel=1e-5)
        assert float(noises[number]) == noise


def test_restored_it_predicts_to_the_bit_and_knows_no_rows() -> None:
    process = fitted(data(30, derivatives=True), points(8, 2))
    restored = InducingProcess.restore(process.tensors())
    for own, other in zip(
        process.predict(points(5, 4)), restored.predict(points(5, 4)), strict=True
    ):
        assert torch.equal(own, other)
    with pytest.raises(SurrogateError, match="has not kept its rows"):
        restored.left_out()


def test_mean_and_deviation_can_be_differentiated() -> None:
    process = fitted(data(30, derivatives=True), points(8, 2))
    leaf = points(4, 5).requires_grad_()
    for part in (0, 1):
        assert torch.autograd.gradcheck(lambda x, part=part: process.predict(x)[part], (leaf,))
