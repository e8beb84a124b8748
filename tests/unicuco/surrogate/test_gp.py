from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.errors import NotPSDError
from torch import Tensor

from unicuco.allocate import AxisCurves
from unicuco.errors import SurrogateError
from unicuco.surrogate import EPSILON, GaussianProcess, Observations, Prior, SurrogateOptions
from unicuco.surrogate.inducing import InducingProcess
from unicuco.surrogate.process import ExactProcess, Rows, ascend

D = 5
WEIGHTS = torch.tensor([0.3, 1.0, 0.1, 0.6, 0.2], dtype=torch.float64)


def curves() -> AxisCurves:
    knots = torch.linspace(0, 1, 257, dtype=torch.float64)
    return AxisCurves(WEIGHTS[:, None] * knots.square())


def truth(points: Tensor) -> Tensor:
    """KL in nats: a sum of what axes cost, and a product of two of them."""
    alone = (WEIGHTS * points.square() * (1 + 0.5 * points)).sum(-1)
    return alone * (1 + points[..., 0] * points[..., 1])


def observe(n: int, seed: int, *, derivatives: bool) -> Observations:
    generator = torch.Generator().manual_seed(seed)
    points = 0.1 + 0.8 * torch.rand(n, D, generator=generator, dtype=torch.float64)
    leaf = points.clone().requires_grad_(True)
    kl = truth(leaf)
    (gradient,) = torch.autograd.grad(kl.sum(), leaf)
    gradients = [tuple(row) if derivatives else None for row in gradient.tolist()]
    return Observations.from_measurements(
        points, kl.detach(), gradients, torch.ones(D, dtype=torch.float64)
    )


def make(
    *, use_curves: bool, directions: int, steps: int = 30, rows: int = 1600
) -> GaussianProcess:
    options = SurrogateOptions(curves=use_curves, directions=directions, steps=steps, rows=rows)
    return GaussianProcess(options, curves() if use_curves else None)


MODES = {
    "values": lambda: make(use_curves=False, directions=0),
    "values on curves": lambda: make(use_curves=True, directions=0),
    "derivatives": lambda: make(use_curves=False, directions=4),
    "derivatives on curves": lambda: make(use_curves=True, directions=4),
    "inducing points": lambda: make(use_curves=True, directions=4, rows=3),
}
modes = pytest.mark.parametrize("build", list(MODES.values()), ids=list(MODES))
Build = Callable[[], GaussianProcess]


def fitted(build: Build, n: int = 14) -> GaussianProcess:
    surrogate = build()
    surrogate.fit(observe(n, 1, derivatives=surrogate.options.directions > 0))
    return surrogate


def fresh_points(n: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return 0.15 + 0.7 * torch.rand(n, D, generator=generator, dtype=torch.float64)


def error(surrogate: GaussianProcess) -> float:
    points = fresh_points()
    mean, _ = surrogate.posterior(points)
    return float((mean - (truth(points) + EPSILON).log()).square().mean().sqrt())


@modes
def test_it_interpolates_what_was_measured(build: Build) -> None:
    surrogate = fitted(build)
    observations = observe(14, 1, derivatives=False)
    mean, std = surrogate.posterior(observations.points)
    assert float((mean - observations.values).abs().max()) < 0.1
    _, elsewhere = surrogate.posterior(torch.ones(1, D, dtype=torch.float64))
    assert float(std.max()) < float(elsewhere)


@modes
def test_it_foretells_what_was_not_measured(build: Build) -> None:
    spread = float((truth(fresh_points()) + EPSILON).log().std())
    assert error(fitted(build)) < 0.5 * spread


@pytest.mark.parametrize(
    "build", [build for name, build in MODES.items() if name != "inducing points"]
)  # for these see test_inducing
def test_left_out_errors_are_those_of_a_process_that_never_saw_the_evaluation(build: Build) -> None:
    process = fitted(build)._model
    assert isinstance(process, ExactProcess)
    rows, targets, noise = (
        process.train_inputs[0],
        process.train_targets,
        process.likelihood.noise,
    )
    errors, variances, noises = process.left_out()
    for number in (0, 5, 13):  # values come first
        point = rows[number, :D]
        others = (rows[:, :D] != point).any(1)
        without = ExactProcess(Rows(rows[others], targets[others], noise[others]))
        without.load_state_dict(process.state_dict(), strict=False)
        without.freeze()
        mean, std = without.predict(point[None])
        assert float(targets[number] - mean) == pytest.approx(float(errors[number]), abs=1e-6)
        expected = float(std.square() + noise[number])
        assert float(variances[number]) == pytest.approx(expected, rel=1e-5)
        assert float(noises[number]) == float(noise[number])


def test_the_deviation_is_scaled_by_what_is_left_out_and_never_down() -> None:
    smooth = fitted(MODES["derivatives on curves"])
    assert 1.0 <= smooth.deviation_scale() < 4.0
    rough = make(use_curves=False, directions=4)
    observations = observe(14, 1, derivatives=True)
    generator = torch.Generator().manual_seed(0)
    wrinkles = 0.5 * torch.randn(14, generator=generator, dtype=torch.float64)
    rough.fit(replace(observations, values=observations.values + wrinkles))
    assert rough.deviation_scale() > smooth.deviation_scale()


@modes
def test_mean_and_deviation_have_the_gradients_of_central_differences(build: Build) -> None:
    surrogate = fitted(build)
    points = fresh_points(6)
    knot = (points * 256 - (points * 256).round()).abs() / 256
    assert float(knot.min()) > 1e-5, "curves are linear between knots: differences must not cross"
    for part in (0, 1):
        leaf = points.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(surrogate.posterior(leaf)[part].sum(), leaf)
        numeric = torch.zeros_like(points)
        for axis in range(D):
            step = torch.zeros(D, dtype=torch.float64)
            step[axis] = 1e-6
            high, low = surrogate.posterior(points + step), surrogate.posterior(points - step)
            numeric[:, axis] = (high[part] - low[part]) / 2e-6
        relative = (gradient - numeric).norm(dim=1) / numeric.norm(dim=1)
        assert float(relative.max()) < 1e-3


def test_derivatives_and_curves_each_make_predictions_better() -> None:
    errors = {name: error(fitted(build, n=8)) for name, build in MODES.items()}
    assert errors["derivatives"] < errors["values"]
    assert errors["derivatives on curves"] < errors["values on curves"] < errors["values"]


def test_a_few_evaluations_may_lack_derivatives() -> None:
    observations = observe(12, 2, derivatives=True)
    observations.derivatives[::3] = float("nan")
    surrogate = make(use_curves=True, directions=4)
    surrogate.fit(observations)
    mean, std = surrogate.posterior(fresh_points())
    assert bool(torch.isfinite(mean).all() and torch.isfinite(std).all())
    assert error(surrogate) < 0.2


def test_values_alone_serve_a_surrogate_that_could_use_derivatives() -> None:
    surrogate = make(use_curves=True, directions=4)
    surrogate.fit(observe(12, 3, derivatives=False))
    reference = make(use_curves=True, directions=0)
    reference.fit(observe(12, 3, derivatives=False))
    assert torch.equal(
        surrogate.posterior(fresh_points())[0], reference.posterior(fresh_points())[0]
    )


def test_log_values_and_unit_derivatives_follow_the_chain_rule() -> None:
    span = torch.tensor([0.5, 1.0, 0.98, 1.0, 0.2], dtype=torch.float64)
    points = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]], dtype=torch.float64)
    gradient = (1.0, -2.0, 0.5, 0.0, 3.0)
    found = Observations.from_measurements(points, torch.tensor([0.7]), [gradient], span)
    kl = float(torch.tensor(0.7))
    assert float(found.values[0]) == pytest.approx(math.log(kl + EPSILON))
    expected = torch.tensor(gradient, dtype=torch.float64) * span / (kl + EPSILON)
    torch.testing.assert_close(found.derivatives[0], expected)


def test_duplicates_are_merged_to_the_mean_of_their_logs_and_keep_their_derivative() -> None:
    base = torch.rand(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    points = base[[2, 0, 2, 1, 0]]
    kl = torch.tensor([0.1, 0.2, 0.4, 0.3, 0.2], dtype=torch.float64)
    gradients = [None, (1.0,) * D, (2.0,) * D, None, None]
    found = Observations.from_measurements(points, kl, gradients, torch.ones(D).double())
    assert torch.equal(found.points, base[[2, 0, 1]])
    logs = (kl + EPSILON).log()
    expected = torch.stack([(logs[0] + logs[2]) / 2, logs[1], logs[3]])
    torch.testing.assert_close(found.values, expected)
    assert found.measured.tolist() == [True, True, False]
    torch.testing.assert_close(found.derivatives[0], torch.full((D,), 2 / 0.4001).double())


def test_many_duplicates_fit_as_well_as_one() -> None:
    one = observe(6, 4, derivatives=True)
    raw = one.derivatives * (truth(one.points) + EPSILON)[:, None]
    many = Observations.from_measurements(
        one.points.repeat(5, 1),
        truth(one.points).repeat(5),
        [tuple(row) for row in raw.repeat(5, 1).tolist()],
        torch.ones(D, dtype=torch.float64),
    )
    assert torch.equal(many.points, one.points)
    surrogates = [make(use_curves=True, directions=4) for _ in range(2)]
    for surrogate, observations in zip(surrogates, (one, many), strict=True):
        surrogate.fit(observations)
    means = [surrogate.posterior(fresh_points())[0] for surrogate in surrogates]
    torch.testing.assert_close(means[0], means[1], rtol=1e-6, atol=1e-6)


@modes
def test_nearly_equal_points_and_a_constant_function_still_fit(build: Build) -> None:
    points = torch.full((6, D), 0.5, dtype=torch.float64)
    points += 1e-10 * torch.arange(6, dtype=torch.float64)[:, None]
    derivatives = torch.zeros(6, D, dtype=torch.float64)
    values = torch.full((6,), -1.0, dtype=torch.float64)
    surrogate = build()
    surrogate.fit(Observations(points=points, values=values, derivatives=derivatives))
    mean, std = surrogate.posterior(points)
    assert bool(torch.isfinite(std).all())
    assert float((mean + 1.0).abs().max()) < 0.1


@modes
def test_a_restored_surrogate_predicts_to_the_bit(build: Build) -> None:
    surrogate = fitted(build)
    state = surrogate.state()
    restored = GaussianProcess.restore(surrogate.options, state)
    for found, expected in zip(
        restored.posterior(fresh_points()), surrogate.posterior(fresh_points()), strict=True
    ):
        assert torch.equal(found, expected)
    again = restored.state()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


@modes
def test_fitting_twice_gives_the_same_to_the_bit(build: Build) -> None:
    one, other = fitted(build), fitted(build)
    assert torch.equal(one.posterior(fresh_points())[0], other.posterior(fresh_points())[0])


@modes
def test_a_fit_that_fails_falls_back_to_the_prior_s_hyperparameters(
    build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(kernel: Any, turns: Sequence[Rows], function: Any, rates: Sequence[float]) -> None:
        if rates:
            raise NotPSDError("not positive definite")

    replace_ascend(monkeypatch, fail)
    with caplog.at_level(logging.WARNING):
        surrogate = fitted(build)
    assert "not positive definite" in caplog.text
    options = surrogate.options
    assert error(surrogate) < (0.3 if options.curves and options.directions else 0.8)


@modes
def test_a_fit_that_fails_even_at_the_prior_is_an_error(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise NotPSDError("not positive definite")

    replace_ascend(monkeypatch, fail)
    with pytest.raises(SurrogateError, match="even at its prior"):
        fitted(build)


def replace_ascend(monkeypatch: pytest.MonkeyPatch, function: Callable[..., None]) -> None:
    for module in ("process", "inducing"):
        monkeypatch.setattr(f"unicuco.surrogate.{module}.ascend", function)


@modes
@pytest.mark.parametrize("count", [14, 80])  # tuned on all at once, and in turns
def test_hyperparameters_that_are_not_finite_count_as_a_failed_fit(
    build: Build,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def spoil(kernel: Any, turns: Sequence[Rows], function: Any, rates: Sequence[float]) -> None:
        ascend(kernel, turns, function, rates)
        if rates:
            kernel.raw_outputscale.data.fill_(float("nan"))

    replace_ascend(monkeypatch, spoil)
    with caplog.at_level(logging.WARNING):
        surrogate = fitted(build, count)
    assert "surrogate fit" in caplog.text
    assert bool(torch.isfinite(surrogate.posterior(fresh_points())[0]).all())


@modes
def test_a_step_to_where_nothing_is_finite_counts_as_a_failed_fit(
    build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, steps = torch.optim.Adam.step, []

    def leap(optimizer: torch.optim.Adam) -> None:
        step(optimizer)
        steps.append(optimizer)
        if len(steps) == 3:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", leap)
    with caplog.at_level(logging.WARNING):
        surrogate = fitted(build)
    assert "surrogate fit" in caplog.text
    assert len(steps) == 3
    assert bool(torch.isfinite(surrogate.posterior(fresh_points())[0]).all())


def test_too_few_evaluations_are_an_error() -> None:
    surrogate = make(use_curves=True, directions=4)
    with pytest.raises(SurrogateError, match="at least two different"):
        surrogate.fit(observe(1, 1, derivatives=True))
    same = torch.full((3, D), 0.5, dtype=torch.float64)
    twins = Observations.from_measurements(same, torch.ones(3), [None] * 3, torch.ones(D).double())
    with pytest.raises(SurrogateError, match="at least two different"):
        surrogate.fit(twins)
    surrogate.fit(observe(2, 1, derivatives=True))
    assert surrogate.posterior(fresh_points())[0].shape == (60,)


def test_no_evaluation_at_all_is_an_error() -> None:
    nothing = Observations.from_measurements(
        torch.zeros(0, D, dtype=torch.float64), torch.zeros(0), [], torch.ones(D).double()
    )
    with pytest.raises(SurrogateError, match="at least two different"):
        make(use_curves=False, directions=0).fit(nothing)


def test_inducing_points_stand_for_evaluations_where_one_direction_each_has_no_room() -> None:
    kinds = {}
    for count in (10, 11):
        surrogate = make(use_curves=True, directions=4, rows=20)
        surrogate.fit(observe(count, 1, derivatives=True))
        kinds[count] = type(surrogate._model)
    assert kinds == {10: ExactProcess, 11: InducingProcess}


def test_a_run_warmed_by_one_of_inducing_points_knows_what_that_one_knew() -> None:
    other = fitted(MODES["inducing points"], 40)
    assert other.mean_ is not None
    prior = Prior(centre=other.mean_.parameters, other=other.state(), places=torch.eye(D).double())
    warmed = GaussianProcess(SurrogateOptions(directions=4), curves(), prior)
    warmed.fit(observe(3, 7, derivatives=True))
    cold = make(use_curves=True, directions=4)
    cold.fit(observe(3, 7, derivatives=True))
    assert error(warmed) < error(cold)
    restored = GaussianProcess.restore(warmed.options, warmed.state())
    assert torch.equal(restored.posterior(fresh_points())[0], warmed.posterior(fresh_points())[0])
    with pytest.raises(SurrogateError, match="has not kept its rows"):
        GaussianProcess.restore(other.options, other.state()).deviation_scale()


def test_nothing_is_asked_before_the_fit() -> None:
    surrogate = make(use_curves=False, directions=0)
    with pytest.raises(SurrogateError, match="not been fitted"):
        surrogate.posterior(fresh_points())
    with pytest.raises(SurrogateError, match="not been fitted"):
        surrogate.state()
    with pytest.raises(ValueError, match="curves"):
        GaussianProcess(SurrogateOptions(curves=True))


@modes
@pytest.mark.slow
def test_a_fit_to_very_many_evaluations_factors_no_more_rows_than_one_to_many(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = error(fitted(build, 14))
    factored: list[int] = []
    factor = psd_safe_cholesky

    def note(matrix: Tensor) -> Tensor:
        factored.append(len(matrix))
        return factor(matrix)

    tuned: list[Sequence[Rows]] = []

    def note_turns(kernel: Any, turns: Sequence[Rows], *others: Any) -> None:
        tuned.append(turns)
        ascend(kernel, turns, *others)

    for module in ("process", "inducing"):
        monkeypatch.setattr(f"unicuco.surrogate.{module}.psd_safe_cholesky", note)
    replace_ascend(monkeypatch, note_turns)
    surrogate = fitted(build, 2000)
    options = surrogate.options
    assert set(factored) == {options.inducing_tuning, options.inducing}
    (turns,) = tuned
    assert all(600 < len(turn.targets) <= options.inducing_tuning_rows for turn in turns)
    assert len(turns) > 1, "all that is known is tuned to, part by part"
    assert error(surrogate) < few


def test_derivatives_along_some_axes_alone_help_along_these() -> None:
    known = observe(8, 0, derivatives=True)
    some = known.derivatives.clone()
    some[:, 3:] = math.nan
    partly = replace(known, derivatives=some)
    assert partly.axes.tolist() == [0, 1, 2]
    errors = {}
    points = observe(200, 9, derivatives=False)
    for name, observations, directions in (
        ("values", known, 0), ("some", partly, 4), ("all", known, 4)
    ):  # fmt: skip
        process = make(use_curves=False, directions=directions)
        process.fit(observations)
        mean, _ = process.posterior(points.points)
        errors[name] = float((mean - points.values).square().mean().sqrt())
    assert errors["all"] < errors["some"] < errors["values"]
    process = make(use_curves=True, directions=4)
    process.fit(partly)
    assert bool(torch.isfinite(process.posterior(points.points)[0]).all())


def prior_of(other: GaussianProcess) -> Prior:
    assert other.mean_ is not None
    places = torch.eye(D, dtype=torch.float64)
    return Prior(other=other.state(), places=places, centre=other.mean_.parameters)


def warmed(other: GaussianProcess, n: int) -> GaussianProcess:
    surrogate = GaussianProcess(other.options, curves(), prior_of(other))
    surrogate.fit(observe(n, 2, derivatives=True))
    return surrogate


def test_what_another_run_knows_is_known_before_much_is_measured() -> None:
    other = fitted(MODES["derivatives on curves"])
    cold = make(use_curves=True, directions=4)
    cold.fit(observe(2, 2, derivatives=True))
    assert error(warmed(other, 2)) < 1.5 * error(other) < error(cold)


def test_what_another_run_got_wrong_is_corrected() -> None:
    other = make(use_curves=True, directions=4)
    seen = observe(14, 1, derivatives=True)
    other.fit(replace(seen, values=seen.values.flip(0), derivatives=-seen.derivatives))
    assert error(other) > 0.5
    assert error(warmed(other, 14)) < 0.1


def test_a_restored_surrogate_knows_what_those_before_it_knew() -> None:
    other = warmed(fitted(MODES["derivatives on curves"]), 3)
    surrogate = warmed(other, 4)
    again = GaussianProcess.restore(surrogate.options, surrogate.state())
    for was, now in zip(
        surrogate.posterior(fresh_points()), again.posterior(fresh_points()), strict=True
    ):
        assert torch.equal(was, now)
    assert warmed(again, 2).posterior(fresh_points())[0].isfinite().all()


def test_a_warmed_surrogate_has_the_gradients_of_central_differences() -> None:
    surrogate = warmed(fitted(MODES["derivatives on curves"]), 3)
    leaf = fresh_points(4).requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate.posterior(leaf)[0].sum(), leaf)
    for axis in range(D):
        step = 1e-5 * torch.eye(D, dtype=torch.float64)[axis]
        up, down = (surrogate.posterior(leaf.detach() + way * step)[0] for way in (1, -1))
        torch.testing.assert_close(gradient[:, axis], (up - down) / 2e-5, rtol=1e-4, atol=1e-6)
